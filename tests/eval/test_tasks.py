"""Held-out tasks: the answer follows from the prompt, the text is never trained on."""

import re

import pytest

from megacontext_jax.data.corpus import mixture
from megacontext_jax.data.corpus.world import document, split_of, stream
from megacontext_jax.errors import UserError
from megacontext_jax.eval import tasks
from tests.corpus_reader import answer_from_text


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_answer_is_derivable_from_the_prompt(kind):
    examples = tasks.make(kind, 200, seed=3)
    assert len({example.prompt for example in examples}) == 200
    for example in examples:
        assert answer_from_text(kind, example.prompt) == example.answer


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_same_seed_same_questions_other_seed_others(kind):
    first = tasks.make(kind, 20, seed=3)
    assert first == tasks.make(kind, 20, seed=3)
    assert first != tasks.make(kind, 20, seed=4)


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_held_out_text_cannot_be_in_training(kind):
    for example in tasks.make(kind, 100, seed=5):
        *statement, question = re.split(
            r"(?<=[.;]) (?=(?:Q:|Where|What|Which|How|Spell|Tell)[^.]*$)", example.prompt
        )
        if statement:
            assert split_of(statement[0]) == "eval"
        else:
            buckets = 8 if kind == "arithmetic" else 16
            words = question.removeprefix("What is ").removeprefix("Spell ").rstrip("?.")
            assert split_of(words.replace(" and ", " "), buckets) == "eval"


@pytest.mark.parametrize("kind", mixture.KINDS)
def test_training_text_stays_out_of_the_other_splits(kind):
    rng = stream("train", 1, kind)
    for _ in range(300):
        item = mixture.make_item(rng, kind, "train", rng.random())
        assert not item.statement or split_of(item.statement) == "train"
        for question in item.questions:
            if kind == "arithmetic":
                assert split_of(question.ask[8:-1], 8) == "train"
            if kind == "spelling":
                assert split_of(question.ask[6:-1].replace(" and ", " ")) == "train"


@pytest.mark.parametrize("kind", mixture.KINDS)
def test_training_answers_are_derivable_too(kind):
    rng = stream("train", 2, kind)
    for _ in range(100):
        item = mixture.make_item(rng, kind, "train", rng.random())
        assert item.questions
        for question in item.questions:
            assert answer_from_text(kind, f"{item.statement} {question.ask}".strip()) == question.answer
        assert document(item).endswith(item.questions[-1].answer)


def test_ledger_is_long_and_key_stands_before_value():
    for example in tasks.make("ledger", 100, seed=0):
        pairs = re.fullmatch(r"Ledger: (.*)\. Q: (\w+)\?", example.prompt)[1].split("; ")
        assert 12 <= len(pairs) <= 24
        key_value = example.answer.removeprefix("A: ").removesuffix(".")
        assert key_value in pairs
        assert example.chance == 1 / len({pair.split()[1] for pair in pairs})


def test_a_guesser_of_the_right_kind_scores_about_chance():
    """The stated chance is what picking any value of the asked kind from the text gives."""
    for kind in ("ledger", "facts", "two_hop"):
        examples = tasks.make(kind, 200, seed=11)
        rng = stream("guess")
        hits = 0
        for example in examples:
            known = set(re.findall(r"\w+", example.prompt.rsplit(".", 1)[0]))
            value = re.findall(r"\w+", example.answer)[-1]
            group = next(g for g in mixture_groups() if value in g)
            hits += rng.choice(sorted(known & group)) == value
        assert hits / 200 == pytest.approx(tasks.chance(examples), abs=0.09)


def mixture_groups():
    from megacontext_jax.data.corpus.words import CLASSES

    return [set(group) for group in CLASSES.values()]


def test_score_is_exact_after_stripping():
    assert tasks.score("ledger", " A: Ida mill.\n", "A: Ida mill.")
    assert not tasks.score("ledger", "A: Ida mill", "A: Ida mill.")
    assert not tasks.score("ledger", "A: Ida barn.", "A: Ida mill.")
    assert not tasks.score("facts", "", "The key is in the mill.")


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="no task kind 'riddle'"):
        tasks.make("riddle", 1, seed=0)
    with pytest.raises(UserError, match="no task kind 'riddle'"):
        tasks.score("riddle", "a", "a")


def test_more_questions_than_there_are_is_refused():
    with pytest.raises(UserError, match="different questions of kind 'arithmetic'"):
        tasks.make("arithmetic", 400, seed=0)


def test_prompts_fit_the_context():
    """With one token per word and mark (spelling: letter), prompt and answer stay under 256 tokens."""
    for kind in tasks.TASKS:
        for example in tasks.make(kind, 100, seed=8):
            pieces = re.findall(r"\w+|[^\w\s]", example.prompt + " " + example.answer)
            assert len(pieces) <= 246
