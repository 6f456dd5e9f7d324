"""Generated conversations about the letters of a word: spelling it, and counting one letter in it.

A tokenizer hides letters from a model, so both tasks write them out one by one, without a space before a
letter (with one it would be another token). Counting ends with a call of the calculator tool and the answer
after `####`, as nanochat's evaluation reads it.
"""

import random
import string
from collections.abc import Sequence
from typing import Any

_QUESTIONS = (
    "How often does {letter} occur in {word}",
    "How many times can you find {letter} in {word}",
    "How many {letter} does the word {word} have",
    "What is the number of {letter} in {word}",
    "Please count every {letter} in the word {word}",
    "Count {letter} in {word} for me",
    "I wonder how many {letter} there are in {word}",
    "{word}: how many {letter}",
    "In {word}, how often do I see the letter {letter}",
    "Looking at {word}, what is the count of the letter {letter}",
    "¿Cuántas veces está {letter} en {word}",
    "Combien de lettres {letter} y a-t-il dans {word}",
    "Wie oft steht der Buchstabe {letter} in {word}",
    "Quante volte compare {letter} in {word}",
)
_RANDOM_LETTER = 0.1  # any letter, most often one the word does not have
_LOWER_CASE = 0.3  # people who write without the shift key
_QUESTION_MARK = 0.5


def spell_word(rng: random.Random, words: Sequence[str]) -> dict[str, Any]:
    """One word of `words`, spelled."""
    word = rng.choice(words)
    return _exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")


def count_letter(rng: random.Random, words: Sequence[str]) -> dict[str, Any]:
    """How often a letter occurs in one word of `words`: counted by hand, checked with the tool."""
    word = rng.choice(words)
    letter = rng.choice(string.ascii_lowercase) if rng.random() < _RANDOM_LETTER else rng.choice(word)
    question = rng.choice(_QUESTIONS)
    if rng.random() < _LOWER_CASE:
        question = question.lower()
    quotes = rng.choices(("", "'", '"'), k=2)
    question = question.format(letter=quotes[0] + letter + quotes[0], word=quotes[1] + word + quotes[1])
    if rng.random() < _QUESTION_MARK:
        question += "?"

    lines, seen = [], 0
    for place, found in enumerate(word, 1):
        seen += found == letter
        lines.append(f"{place}:{found} yes, {seen} so far" if found == letter else f"{place}:{found}")
    by_hand = (
        f"I spell {word} and look for '{letter}'.\n\n{word}:{','.join(word)}\n\n"
        + "\n".join(lines)
        + f"\n\nBy hand I get {seen}. A check with Python:\n\n"
    )
    answer = [
        {"type": "text", "text": by_hand},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(word.count(letter))},
        {
            "type": "text",
            "text": f"\n\nPython says {word.count(letter)} as well.\n\n#### {word.count(letter)}",
        },
    ]
    return _exchange(question, answer)


def _exchange(question: str, answer: str | list) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
