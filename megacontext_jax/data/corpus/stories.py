"""Short stories: facts told in varied sentences, then each one asked; the answer restates the subject."""

import random
from dataclasses import dataclass

from megacontext_jax.data.corpus.words import (
    ANIMALS,
    COLOURS,
    FILLER,
    FOODS,
    JOBS,
    NAMES,
    OBJECTS,
    PLACES,
    TOWNS,
)
from megacontext_jax.data.corpus.world import Item, Question


@dataclass(frozen=True)
class Relation:
    """Sentence forms of one kind of fact: `{k}` is the subject, `{v}` the value, `{n}` some person."""

    keys: tuple[str, ...]
    values: tuple[str, ...]
    plain: str
    ask: str
    varied: tuple[str, ...]


_VERBS = ("hid", "left", "put", "kept", "stored", "found", "saw", "dropped", "placed", "lost", "locked")

RELATIONS = {
    "place": Relation(
        OBJECTS,
        PLACES,
        "The {k} is in the {v}.",
        "Where is the {k}?",
        (
            *("{n} " + verb + " the {k} in the {v}." for verb in _VERBS),
            "The {k} stood in the {v}.",
            "The {k} was in the {v} all day.",
            "You can find the {k} in the {v}.",
            "{n} carried the {k} to the {v}.",
            "Look for the {k} in the {v}.",
        ),
    ),
    "colour": Relation(
        OBJECTS,
        COLOURS,
        "The {k} is {v}.",
        "What colour is the {k}?",
        (
            "{n} painted the {k} {v}.",
            "The {k} was bright {v}.",
            "{n} made the {k} dark {v}.",
            "The {k} looked {v}.",
            "The {k} turned {v}.",
            "Everyone knew the {k} was {v}.",
        ),
    ),
    "job": Relation(
        NAMES,
        JOBS,
        "{k} is a {v}.",
        "What is the work of {k}?",
        (
            "{k} works as a {v}.",
            "{k} became a {v}.",
            "{k} was a good {v}.",
            "{k} wanted to be a {v}.",
            "They call {k} the {v}.",
            "Everyone knew {k} as a {v}.",
            "{k} is an old {v}.",
        ),
    ),
    "town": Relation(
        NAMES,
        TOWNS,
        "{k} lives in {v}.",
        "Where does {k} live?",
        (
            "{k} moved to {v}.",
            "{k} has a house in {v}.",
            "{k} came from {v}.",
            "The home of {k} is {v}.",
            "{k} never left {v}.",
            "{k} was born in {v}.",
        ),
    ),
    "animal": Relation(
        NAMES,
        ANIMALS,
        "{k} has a {v}.",
        "Which animal does {k} have?",
        (
            "{k} keeps a {v}.",
            "{k} owns a small {v}.",
            "{k} found a {v}.",
            "{k} bought a young {v}.",
            "{k} plays with a {v}.",
            "{k} feeds the {v}.",
        ),
    ),
    "food": Relation(
        NAMES,
        FOODS,
        "{k} likes {v}.",
        "What does {k} like?",
        (
            "{k} often eats {v}.",
            "{k} asked for {v}.",
            "{k} made some {v}.",
            "{k} loves {v}.",
            "{k} wants more {v}.",
            "For {k} the best meal is {v}.",
        ),
    ),
}
_NAMES = tuple(RELATIONS)
_OPENERS = ("Later", "Today", "In the morning", "After lunch", "Before noon", "At night")


def _sentence(rng: random.Random, relation: Relation, key: str, value: str, variety: float) -> str:
    if rng.random() >= variety:
        return relation.plain.format(k=key, v=value)
    form = relation.varied[int(rng.random() * len(relation.varied))]
    text = form.format(k=key, v=value, n=NAMES[int(rng.random() * len(NAMES))])
    if form[0] == "{" and rng.random() < 0.15:
        text = f"{_OPENERS[int(rng.random() * len(_OPENERS))]} {text}"
    return text


@dataclass(frozen=True)
class Story:
    """Sentences of facts, and the facts (relation, key, value) in the order they are told."""

    text: str
    told: tuple[tuple[str, str, str], ...]


def tell(rng: random.Random, n_facts: int, variety: float, n_relations: int) -> Story:
    """A story of `n_facts` facts over `n_relations` kinds, each about a person or thing of its own.

    A sentence is varied with probability `variety`.
    """
    told: list[tuple[str, str, str]] = []
    free = {NAMES: rng.sample(NAMES, n_facts), OBJECTS: rng.sample(OBJECTS, n_facts)}
    for i, kind in enumerate(rng.sample(_NAMES, n_relations)):
        n = n_facts // n_relations + (i < n_facts % n_relations)
        relation = RELATIONS[kind]
        keys = [free[relation.keys].pop() for _ in range(n)]
        told += [(kind, k, v) for k, v in zip(keys, rng.choices(relation.values, k=n), strict=True)]
    rng.shuffle(told)
    sentences = []
    for kind, key, value in told:
        sentences.append(_sentence(rng, RELATIONS[kind], key, value, variety))
        if rng.random() < 0.04 * variety:
            sentences.append(FILLER[int(rng.random() * len(FILLER))])
    return Story(" ".join(sentences), tuple(told))


def facts(
    rng: random.Random, n_facts: int, n_questions: int, *, variety: float = 1.0, n_relations: int = 2
) -> Item:
    """A story, then questions about its facts in random order.

    A question's chance is one over the number of different values of its own kind in the story: the accuracy
    of a reader who knows which kind of word to say and not which one.
    """
    story = tell(rng, n_facts, variety, n_relations)
    chances = {kind: 1.0 / len({v for k, _, v in story.told if k == kind}) for kind, _, _ in story.told}
    asked: list[tuple[str, str, str]] = []
    while len(asked) < n_questions:
        asked += rng.sample(story.told, len(story.told))
    questions = tuple(
        [
            Question(RELATIONS[kind].ask.format(k=k), RELATIONS[kind].plain.format(k=k, v=v), chances[kind])
            for kind, k, v in asked[:n_questions]
        ]
    )
    return Item("facts", story.text, questions)


def retell(
    rng: random.Random, n_facts: int, n_questions: int, *, variety: float = 1.0, n_relations: int = 2
) -> Item:
    """A story, then all of it in plain sentences in another order: a fact per six tokens, the dense `facts`."""
    story = tell(rng, n_facts, variety, n_relations)
    questions = []
    for _ in range(n_questions):
        facts = rng.sample(story.told, len(story.told))
        plain = " ".join([RELATIONS[kind].plain.format(k=k, v=v) for kind, k, v in facts])
        questions.append(Question(f"Tell of {', '.join([k for _, k, _ in facts])}.", plain, 0.0))
    return Item("retell", story.text, tuple(questions))


def extract(
    rng: random.Random, n_facts: int, n_questions: int, *, variety: float = 1.0, n_relations: int = 2
) -> Item:
    """A story, then questions in the manner of a ledger: `Q: lantern, Ida? A: lantern attic; Ida Riga.`

    The bridge from ledgers to stories: the answer side is the ledger's, what is new is to tie a value to the
    subject of its sentence.
    """
    story = tell(rng, n_facts, variety, n_relations)
    questions = []
    for _ in range(n_questions):
        facts = rng.sample(story.told, len(story.told))
        answer = "; ".join([f"{k} {v}" for _, k, v in facts])
        questions.append(Question(f"Q: {', '.join([k for _, k, _ in facts])}?", f"A: {answer}.", 0.0))
    return Item("extract", story.text, tuple(questions))


def retell_document(item: Item) -> str:
    """The story and its plain sentences, without the questions."""
    return " ".join([item.statement, *(f"In short: {q.answer}" for q in item.questions)])


def extract_document(item: Item) -> str:
    """The story and its facts as ledgers, without the questions."""
    return " ".join([item.statement, *("Ledger" + q.answer.removeprefix("A") for q in item.questions)])


def moves(rng: random.Random, n_objects: int, n_moves: int, n_questions: int) -> Item:
    """Objects that change their place: the last place counts."""
    objects = rng.sample(OBJECTS, n_objects)
    where = {}
    sentences = []
    for thing in objects:
        where[thing] = rng.choice(PLACES)
        sentences.append(_sentence(rng, RELATIONS["place"], thing, where[thing], 0.5))
    seen = list(where.values())
    for _ in range(n_moves):
        thing = rng.choice(objects)
        where[thing] = rng.choice(PLACES)
        seen.append(where[thing])
        sentences.append(f"Then {rng.choice(NAMES)} moved the {thing} to the {where[thing]}.")
    chance = 1.0 / len(set(seen))
    asked: list[str] = []
    while len(asked) < n_questions:
        asked += rng.sample(objects, n_objects)
    relation = RELATIONS["place"]
    questions = tuple(
        [
            Question(relation.ask.format(k=k), relation.plain.format(k=k, v=where[k]), chance)
            for k in asked[:n_questions]
        ]
    )
    return Item("moves", " ".join(sentences), questions)


def passkey(rng: random.Random, n_before: int, n_after: int) -> Item:
    """A passkey told once among filler sentences and asked at the end."""
    key = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
    lines = rng.choices(FILLER, k=n_before)
    lines.append(f"Remember that the passkey is {key}.")
    lines += rng.choices(FILLER, k=n_after)
    question = Question("What is the passkey?", f"The passkey is {key}.", 1 / (len(COLOURS) * len(OBJECTS)))
    return Item("passkey", " ".join(lines), (question,))
