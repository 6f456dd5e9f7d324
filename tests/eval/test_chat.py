import io
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.eval import chat
from megacontext_jax.eval.tasks import Example, make
from tests.infer import mocks
from tests.infer.mocks import MockDecoder, mock_engine, one_hot_logits

TOK = mocks.tokenizer()
END = TOK.special("<|assistant_end|>")
SPEAK = TOK.special("<|assistant_start|>")


def example(kind, question, answer, chance=0.25):
    return Example(kind, ({"role": "user", "content": question},), answer, chance)


def parrot(**options):
    """A model that says Z and stops."""
    return MockDecoder(lambda _, last_B: one_hot_logits(jnp.where(last_B == SPEAK, ord("Z"), END)), **options)


def ask(examples, decoder=None, **options):
    engine = mock_engine(decoder or parrot())
    return chat.evaluate_tasks(engine, examples, stream=io.StringIO(), **options)


def test_counts_exact_answers_by_kind():
    examples = [
        example("facts", "a?", "Z", 0.5),
        example("ledger", "b?", "Z"),
        example("facts", "c" * 70, "z", 0.25),
        example("facts", "d" * 30, "Z "),
        example("facts", "e", "ZZ", 0.0),
    ]
    results, transcripts = ask(examples, batch_size=2)
    assert results == {
        "facts": {"accuracy": 0.5, "chance": 0.25, "n": 4},
        "ledger": {"accuracy": 1.0, "chance": 0.25, "n": 1},
    }
    assert list(results) == ["facts", "ledger"]
    assert transcripts == [
        {"kind": "facts", "prompt": "a?", "completion": "Z", "answer": "Z"},
        {"kind": "ledger", "prompt": "b?", "completion": "Z", "answer": "Z"},
        {"kind": "facts", "prompt": "c" * 70, "completion": "Z", "answer": "z"},
    ]


def test_questions_beyond_the_window_count_as_wrong_and_are_named():
    examples = [example("facts", "x" * n, "Z") for n in (5, 50, 90, 200)]
    results, transcripts = ask(examples, parrot(window=64))
    assert results["facts"] == {"accuracy": 0.5, "chance": 0.25, "n": 4, "too_long": 2}
    assert [t["prompt"] for t in transcripts] == ["x" * 5, "x" * 50]


def test_results_do_not_depend_on_batches():
    """Real decoding: every completion equals the one its prompt gets alone."""
    engine = mocks.tiny_engine()
    examples = [example("facts", "x" * n, "?") for n in (1, 5, 4, 2, 3)]
    _, together = chat.evaluate_tasks(
        engine, examples, batch_size=3, max_new_tokens=6, transcripts_per_kind=9, stream=io.StringIO()
    )
    for x, transcript in zip(examples, together, strict=True):
        prompt = TOK.render_for_completion(x.conversation())
        rows, _ = engine.generate_batch([prompt], max_tokens=6, temperature=0.0)
        assert transcript["completion"] == TOK.decode(rows[0][len(prompt) :])


def test_every_batch_runs_the_same_program_when_lengths_allow():
    decoder = parrot()
    ask([example("facts", "a" * n, "Z") for n in range(1, 9)], decoder, batch_size=3)
    assert decoder.traced == {"prefill": 1, "decode_step": 1}


def test_shows_progress():
    stream = io.StringIO()
    chat.evaluate_tasks(mock_engine(parrot()), [example("facts", "a", "Z")], stream=stream)
    assert "1/1 questions" in stream.getvalue()


def options(**changes):
    defaults = {"tasks": "", "num_examples": 3, "eval_seed": 5, "eval_batch_size": 20, "max_new_tokens": 4}
    return SimpleNamespace(**defaults | changes)


def answering(examples):
    """A model that knows the answers to `examples`, by the last two tokens before it speaks."""
    script = {}
    for x in examples:
        prompt = TOK.render_for_completion(x.conversation())
        script[len(prompt)] = [*TOK.encode(x.answer), END]
    table = np.full(4096, END)
    for length, answer in script.items():
        table[length : length + len(answer)] = answer
    return MockDecoder(lambda length_B, _: one_hot_logits(jnp.asarray(table)[length_B]), window=4000)


def test_evaluates_the_generated_kinds():
    examples = make("ledger", 1, 5)
    results, transcripts = chat.evaluate_kinds(
        mock_engine(answering(examples)), options(tasks="ledger", num_examples=1, max_new_tokens=40)
    )
    assert results["ledger"] == {"accuracy": 1.0, "chance": examples[0].chance, "n": 1}
    assert transcripts[0]["completion"] == examples[0].answer
    results, _ = chat.evaluate_kinds(mock_engine(parrot(window=4000)), options(tasks="facts | ledger"))
    assert {kind: r["n"] for kind, r in results.items()} == {"facts": 3, "ledger": 3}
    results, _ = chat.evaluate_kinds(mock_engine(parrot(window=4000)), options(num_examples=1))
    assert len(results) > 5


def test_refuses_what_does_not_exist():
    with pytest.raises(UserError, match="no task kind 'ledgers'"):
        chat.evaluate_kinds(mock_engine(parrot()), options(tasks="facts|ledgers"))
    with pytest.raises(UserError, match="--eval-batch-size 0"):
        chat.evaluate_kinds(mock_engine(parrot()), options(eval_batch_size=0))


def test_no_question_no_result():
    assert ask([]) == ({}, [])
