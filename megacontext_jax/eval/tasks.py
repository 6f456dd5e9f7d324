"""Held-out generated tasks: fresh questions of every kind the built-in corpus teaches.

The text of a task belongs to the corpus's `eval` split, which is decided by a hash of the text itself: no
seed of the generator can put it into training. Answers are compared whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from megacontext_jax.data.corpus import arithmetic, ledgers, spelling, stories
from megacontext_jax.data.corpus.words import CLASSES
from megacontext_jax.data.corpus.world import Item, Question, split_of, stream
from megacontext_jax.errors import UserError

SPLIT = "eval"


@dataclass(frozen=True)
class Example:
    """One question: the chat messages that ask it, the exact answer, and the accuracy of an informed guess.

    `chance` is what a reader gets who knows the kind of the answer and picks among the values of that kind in
    the text (or in the whole range, where the text holds none).
    """

    kind: str
    messages: tuple[dict[str, str], ...]
    answer: str
    chance: float

    @property
    def prompt(self) -> str:
        """The text of the (single) user turn."""
        return self.messages[-1]["content"]

    def conversation(self) -> dict[str, list[dict[str, str]]]:
        """The question with its answer as a conversation, for rendering (drop the last message to ask)."""
        return {"messages": [*self.messages, {"role": "assistant", "content": self.answer}]}


@dataclass(frozen=True)
class Task:
    """A kind of question: how to draw an item with one question, and one line about it."""

    name: str
    about: str
    draw: Callable[[Random], Item]


def _ledger(rng: Random) -> Item:
    return ledgers.ledger(rng, rng.randint(12, 24), 1)


def _facts(rng: Random) -> Item:
    return stories.facts(rng, rng.randint(6, 8), 1, variety=1.0, n_relations=rng.randint(1, 2))


def _plain_facts(rng: Random) -> Item:
    return stories.facts(rng, rng.randint(6, 8), 1, variety=0.0, n_relations=rng.randint(1, 2))


def _extract(rng: Random) -> Item:
    """One key of a story, asked in the manner of a ledger."""
    item = stories.extract(rng, rng.randint(6, 8), 1, variety=1.0, n_relations=rng.randint(1, 2))
    keys = item.questions[0].answer.removeprefix("A: ").removesuffix(".").split("; ")
    values = [pair.split()[1] for pair in keys]
    same = next(group for group in CLASSES.values() if values[0] in group)
    chance = 1 / len({value for value in values if value in same})
    question = Question(f"Q: {keys[0].split()[0]}?", f"A: {keys[0]}.", chance)
    return Item(item.kind, item.statement, (question,))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ledger", "12-24 pairs, one key asked", _ledger),
        Task("facts", "6-8 facts in varied sentences, one asked", _facts),
        Task("plain_facts", "6-8 facts in one form of sentence per kind, one asked", _plain_facts),
        Task("extract", "6-8 facts in varied sentences, one asked as a ledger is", _extract),
        Task("two_hop", "object -> person -> place", lambda rng: ledgers.two_hop(rng, rng.randint(4, 8), 1)),
        Task(
            "moves",
            "3 objects, moved up to 4 times, last place asked",
            lambda rng: stories.moves(rng, 3, 3, 1),
        ),
        Task("passkey", "a key among filler", lambda rng: stories.passkey(rng, rng.randint(0, 12), 12)),
        Task(
            "arithmetic",
            "one sum or difference of a number up to 99 and a digit",
            lambda rng: arithmetic.sums(rng, 1, SPLIT),
        ),
        Task("counting", "beads of one colour", lambda rng: arithmetic.counting(rng, rng.randint(4, 9), 1)),
        Task("spelling", "two words letter by letter", lambda rng: spelling.spelling(rng, 1, SPLIT)),
    )
}


def make(kind: str, n: int, seed: int) -> list[Example]:
    """n examples of a kind, the same for the same seed, no two alike.

    Raises UserError for a kind that does not exist.
    """
    if kind not in TASKS:
        raise UserError(f"There is no task kind {kind!r}; choose from {', '.join(TASKS)}.")
    rng = stream(SPLIT, seed, kind)
    examples: dict[str, Example] = {}
    tries = 0
    while len(examples) < n:
        tries += 1
        if tries > 200 * n + 10_000:
            raise UserError(
                f"There are only {len(examples)} different questions of kind {kind!r}; ask for fewer."
            )
        item = TASKS[kind].draw(rng)
        if item.statement and split_of(item.statement) != SPLIT:
            continue
        question: Question = item.questions[0]
        content = f"{item.statement} {question.ask}".strip()
        messages = ({"role": "user", "content": content},)
        examples.setdefault(content, Example(kind, messages, question.answer, question.chance))
    return list(examples.values())


def score(kind: str, completion: str, answer: str) -> bool:
    """Whether a completion is the answer: equal after stripping white space at both ends."""
    if kind not in TASKS:
        raise UserError(f"There is no task kind {kind!r}; choose from {', '.join(TASKS)}.")
    return completion.strip() == answer.strip()


def chance(examples: list[Example]) -> float:
    """The accuracy an informed guess would reach on these examples."""
    return sum(example.chance for example in examples) / len(examples)
