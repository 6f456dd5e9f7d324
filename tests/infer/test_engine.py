import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.infer import engine as engine_module
from megacontext_jax.infer import sampler
from megacontext_jax.infer.engine import Engine, bucket
from megacontext_jax.infer.model import GPTDecoder, Model, gpt_model
from megacontext_jax.model.arch import GPTConfig
from tests.infer import mocks
from tests.infer.mocks import NANOCHAT, TINY, MockDecoder, mock_engine, naive_greedy, one_hot_logits, scripted
from tests.model.nanochat_weights import CASES, golden_model

TOK = mocks.tokenizer()
BOS, END = TOK.bos, TOK.special("<|assistant_end|>")
CALL, CALLED = TOK.special("<|python_start|>"), TOK.special("<|python_end|>")
PROMPT = [BOS, 72, 101, 108, 108, 111]


def prompts_of_lengths(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [[BOS, *map(int, rng.integers(0, 256, n - 1))] for n in lengths]


# What a batch returns


def test_same_seed_same_output_and_seeds_vary():
    engine = mock_engine(mocks.uniform())
    runs = [engine.generate_batch([PROMPT], max_tokens=20, seed=seed)[0][0] for seed in (1, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 3
    assert len(set(runs[0][len(PROMPT) :])) > 10  # every step of a row draws anew


def test_samples_of_a_prompt_differ_from_the_first_token_on():
    engine = mock_engine(mocks.uniform())
    rows, masks = engine.generate_batch([PROMPT], num_samples=16, max_tokens=4)
    assert len(rows) == len(masks) == 16
    assert len({row[len(PROMPT)] for row in rows}) > 8


def test_temperature_zero_is_deterministic():
    engine = mocks.tiny_engine()
    first = engine.generate_batch([PROMPT], max_tokens=10, temperature=0.0, seed=1)
    assert first == engine.generate_batch([PROMPT], max_tokens=10, temperature=0.0, seed=2)


@pytest.mark.parametrize("max_tokens", [1, 2, 63, 64, 65, 130])
def test_max_tokens(max_tokens):
    engine = mock_engine(MockDecoder(lambda length_B, _: one_hot_logits(length_B % 7)))
    rows, masks = engine.generate_batch([PROMPT, PROMPT[:2]], max_tokens=max_tokens, temperature=0.0)
    assert rows[0] == PROMPT + [(len(PROMPT) + i) % 7 for i in range(max_tokens)]
    assert rows[1] == PROMPT[:2] + [(2 + i) % 7 for i in range(max_tokens)]
    assert masks[0] == [0] * len(PROMPT) + [1] * max_tokens


def test_rows_of_several_prompts_and_samples_are_prompt_major():
    engine = mock_engine(MockDecoder(lambda _, last_B: one_hot_logits(last_B)))
    rows, _ = engine.generate_batch([[5], [6, 7]], num_samples=2, max_tokens=2, temperature=0.0)
    assert rows == [[5, 5, 5], [5, 5, 5], [6, 7, 7, 7], [6, 7, 7, 7]]


def test_terminal_tokens_are_streamed_and_dropped_from_batches():
    script = [65, 66, END, 67]
    engine = mock_engine(scripted(script, len(PROMPT)))
    events = list(engine.generate([PROMPT], temperature=0.0))
    assert [event.token for event in events] == script[:3]
    assert [event.stop for event in events] == [None, None, "end"]
    assert engine.generate_batch([PROMPT], temperature=0.0)[0] == [[*PROMPT, 65, 66]]
    engine = mock_engine(scripted([65, BOS], len(PROMPT)))
    assert engine.generate_batch([PROMPT], temperature=0.0)[0] == [[*PROMPT, 65]]


def test_finished_rows_are_silent_while_others_go_on():
    """The second prompt starts later in the script and so ends earlier."""
    engine = mock_engine(scripted([*range(60, 70), END], 1))
    events = list(engine.generate([[BOS], [BOS] * 8], temperature=0.0, tokens_per_sync=4))
    assert [e.token for e in events if e.row == 0] == [*range(60, 70), END]
    assert [e.token for e in events if e.row == 1] == [67, 68, 69, END]
    assert [(e.row, e.stop) for e in events if e.stop] == [(1, "end"), (0, "end")]


def test_a_finished_row_does_not_advance():
    engine = mocks.tiny_engine()
    state, _ = engine._begin([PROMPT, PROMPT], 1, 10, 0)
    state = state._replace(left_B=jnp.array([10, 0]))
    chosen, _ = sampler.settings(0.0, None, None, 320)
    step = jax.jit(engine_module._sample_step, static_argnames=("decoder", "candidates"))
    state, token_B, _ = step(
        engine.model.params,
        state,
        sampler.row_keys(0, 2),
        chosen,
        engine._marks,
        decoder=engine.model.decoder,
        candidates=1,
    )
    assert state.cache.length_B.tolist() == [len(PROMPT) + 1, len(PROMPT)]
    assert token_B[1] == engine_module.NO_TOKEN
    assert state.said_B.tolist() == [1, 0]


@pytest.mark.parametrize("tokens_per_sync", [1, 3, 8, 64])
def test_syncs_do_not_change_what_is_said(tokens_per_sync):
    engine = mocks.tiny_engine()
    prompts = prompts_of_lengths(3, 9)
    options = {"max_tokens": 7, "temperature": 0.8, "top_k": 40, "seed": 5}
    expected, _ = engine.generate_batch(prompts, **options)
    said = [[], []]
    for event in engine.generate(prompts, tokens_per_sync=tokens_per_sync, **options):
        said[event.row].append(event.token)
    assert [p + s for p, s in zip(prompts, said, strict=True)] == expected


# Against the model


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_nanochat(golden, case):
    cfg, params, _ = golden_model(golden / "nanochat" / case)
    engine = Engine(gpt_model(params, cfg), TOK)
    expected = json.loads((golden / "nanochat" / case / "greedy.json").read_text())
    prompt, said = expected["prompt"], expected["greedy_next_24"]
    rows, masks = engine.generate_batch([prompt] * 2, max_tokens=24, temperature=0.0)
    stop = next(
        (i for i, t in enumerate(said) if t in (TOK.bos, END)), len(said)
    )  # nanochat's loop here did not stop
    assert rows == [prompt + said[:stop]] * 2
    assert masks == [[0] * 8 + [1] * stop] * 2


def test_greedy_equals_recomputation_for_any_mixture_of_lengths():
    params = mocks.tiny_params()
    engine = Engine(gpt_model(params, TINY), TOK)
    prompts = prompts_of_lengths(1, 2, 15, 16, 17, 40)
    together, _ = engine.generate_batch(prompts, max_tokens=20, temperature=0.0)
    for prompt, row in zip(prompts, together, strict=True):
        assert row == naive_greedy(params, TINY, prompt, len(row) - len(prompt))
    alone = [engine.generate_batch([p], max_tokens=20, temperature=0.0)[0][0] for p in prompts[2:4]]
    assert alone == together[2:4]


def test_idle_rows_change_nothing():
    engine = mocks.tiny_engine()
    prompts = prompts_of_lengths(4, 7)
    options = {"max_tokens": 9, "temperature": 1.0, "seed": 3}
    assert engine.generate_batch(prompts, pad_rows=5, **options) == engine.generate_batch(prompts, **options)


def test_half_precision_weights_are_cast_once():
    model = gpt_model(mocks.tiny_params(), TINY, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    rows, _ = Engine(model, TOK).generate_batch([PROMPT], max_tokens=5, temperature=0.0)
    assert len(rows[0]) == len(PROMPT) + 5


# The tool


def test_tool_use_equals_nanochat():
    expected = NANOCHAT["tool_use"]
    engine = mock_engine(scripted(expected["script"], len(PROMPT)))
    for sync in (1, 5, 64):
        events = list(engine.generate([PROMPT], temperature=0.0, tokens_per_sync=sync))
        assert [event.token for event in events] == expected["emitted"]
        assert [int(event.sampled) for event in events] == expected["mask"]


def test_tool_use_of_rows_at_different_times():
    """The rows read one script from different places: their calls overlap, none disturbs another."""
    call = [CALL, *TOK.encode("12/60"), CALLED]
    answer = [TOK.special("<|output_start|>"), *TOK.encode("0.2"), TOK.special("<|output_end|>")]
    script = [65, *call, *[88] * len(answer), *call, *[89] * len(answer), 66, END]
    engine = mock_engine(scripted(script, 1))
    shift = [0, 1, 2]
    rows, masks = engine.generate_batch([[BOS] * (1 + s) for s in shift], temperature=0.0)
    full = [65, *call, *answer, *call, *answer, 66]
    mask = [1, *[1] * len(call), *[0] * len(answer), *[1] * len(call), *[0] * len(answer), 1]
    assert rows[0][1:] == full
    assert masks[0][1:] == mask
    assert rows[1][2:] == full[1:]
    # the third row starts inside the call and never opened it: no answer to the first, one to the second
    late = [*call[1:], *[88] * len(answer), *call, *answer, 66]
    assert rows[2][3:] == late
    assert masks[2][3:] == [*[1] * (len(call) - 1 + len(answer) + len(call)), *[0] * len(answer), 1]


@pytest.mark.parametrize("call", ["import os", "1/0", ""])
def test_a_call_without_a_value_gets_no_answer(call):
    script = [CALL, *TOK.encode(call), CALLED, 65, END]
    engine = mock_engine(scripted(script, len(PROMPT)))
    rows, masks = engine.generate_batch([PROMPT], temperature=0.0)
    assert rows[0][len(PROMPT) :] == script[:-1]
    assert set(masks[0][len(PROMPT) :]) == {1}


def test_an_answer_is_cut_by_max_tokens():
    script = [CALL, *TOK.encode("1+1"), CALLED, *[88] * 20]
    engine = mock_engine(scripted(script, len(PROMPT)))
    for max_tokens in range(5, 9):
        rows, _ = engine.generate_batch([PROMPT], temperature=0.0, max_tokens=max_tokens)
        assert len(rows[0]) == len(PROMPT) + max_tokens


class Overridden:
    """The tiny model, made to say `script` first."""

    vocab_size, window = TINY.vocab_size, TINY.sequence_len

    def __init__(self, script, start):
        self.inner, self.start = GPTDecoder(TINY), start
        self.script_V = one_hot_logits(jnp.asarray(script))

    def init_cache(self, *shape):
        return self.inner.init_cache(*shape)

    def _override(self, logits_BV, cache):
        i_B = cache.length_B - self.start
        scripted_BV = self.script_V[jnp.clip(i_B, 0, len(self.script_V) - 1)]
        return jnp.where((i_B < len(self.script_V))[:, None], scripted_BV, logits_BV), cache

    def prefill(self, *args):
        return self._override(*self.inner.prefill(*args))

    def decode_step(self, *args):
        return self._override(*self.inner.decode_step(*args))


def test_the_cache_sees_forced_tokens():
    """After a tool's answer the model goes on as if it had read the answer."""
    params = mocks.tiny_params()
    script = [CALL, *TOK.encode("2+3"), CALLED]
    engine = Engine(
        Model(Overridden(script, len(PROMPT)), gpt_model(params, TINY).params),
        TOK,
    )
    rows, masks = engine.generate_batch([PROMPT], temperature=0.0, max_tokens=len(script) + 3 + 12)
    read = [
        *PROMPT,
        *script,
        TOK.special("<|output_start|>"),
        *TOK.encode("5"),
        TOK.special("<|output_end|>"),
    ]
    assert rows[0][: len(read)] == read
    assert masks[0][len(PROMPT) : len(read)] == [*[1] * len(script), 0, 0, 0]
    assert rows[0] == naive_greedy(params, TINY, read, len(rows[0]) - len(read))
    assert len(rows[0]) > len(read)


# The window


def test_the_window_ends_an_answer():
    engine = mock_engine(MockDecoder(lambda length_B, _: one_hot_logits(length_B % 7), window=40))
    for max_tokens in (None, 100):
        events = list(engine.generate([PROMPT, [BOS]], temperature=0.0, max_tokens=max_tokens))
        assert [sum(e.row == row for e in events) for row in (0, 1)] == [40 - len(PROMPT), 39]
        assert [e.stop for e in events if e.stop] == ["window", "window"]
    events = list(engine.generate([PROMPT, [BOS]], temperature=0.0, max_tokens=36))
    assert [(e.row, e.stop) for e in events if e.stop] == [(0, "window"), (1, "length")]


def test_a_full_window_is_read_correctly_to_the_end():
    params = mocks.tiny_params(3)
    engine = Engine(gpt_model(params, TINY), TOK)
    prompt = prompts_of_lengths(50)[0]
    rows, _ = engine.generate_batch([prompt], temperature=0.0)
    assert rows[0] == naive_greedy(params, TINY, prompt, len(rows[0]) - 50)
    assert len(rows[0]) == 64
    assert len(engine.generate_batch([prompts_of_lengths(63)[0]])[0][0]) == 64


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_a_prompt_beyond_the_window_is_refused_with_both_numbers(length):
    engine = mocks.tiny_engine()
    with pytest.raises(UserError, match=rf"^The prompt has {length:,} tokens .* holds 64\b"):
        engine.generate([[1] * length])
    with pytest.raises(UserError, match=rf"^Prompt 2 has {length:,} tokens"):
        engine.generate_batch([[1], [1] * length])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "empty"),
        ([[1], []], {}, "Prompt 2 is empty"),
        ([[320]], {}, "vocabulary of 320"),
        ([[-1]], {}, "vocabulary of 320"),
        ([[1]], {"max_tokens": 0}, "--max-tokens 0"),
        ([[1]], {"num_samples": 0}, "--num-samples 0"),
        ([[1]], {"temperature": -1}, "--temperature -1"),
        ([[1]], {"tokens_per_sync": 0}, "tokens_per_sync 0"),
        ([[1]], {"tokens_per_sync": 65}, "tokens_per_sync 65"),
    ],
)
def test_refusals_come_at_once(prompts, options, message):
    with pytest.raises(UserError, match=message):
        mocks.tiny_engine().generate(prompts, **options)  # not iterated


# Compilation


def test_buckets():
    sizes = [bucket(n, 10**6) for n in range(1, 2000)]
    assert all(n <= size <= max(16, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert bucket(200, 250) == 250


def test_lengths_and_settings_share_programs():
    decoder = mocks.uniform()
    engine = mock_engine(decoder)
    for n in (1, 3, 8, 15, 16):
        for options in ({"top_k": 50}, {"top_k": 33, "temperature": 0.3}, {"top_k": 64, "top_p": 0.9}):
            list(engine.generate([[1] * n], max_tokens=48, seed=n, **options))
    assert decoder.traced == {"prefill": 1, "decode_step": 1}
    engine.generate_batch([[1] * 9], max_tokens=48, temperature=0.0)
    assert decoder.traced["decode_step"] == 2  # greedy is another program
    engine.generate_batch([[1] * 9] * 3, max_tokens=48, temperature=0.0, pad_rows=4)
    engine.generate_batch([[1] * 9] * 4, max_tokens=48, temperature=0.0, pad_rows=4)
    assert decoder.traced == {"prefill": 2, "decode_step": 3}


def test_engines_of_equal_models_share_programs():
    mocks.tiny_engine(0).generate_batch([PROMPT], max_tokens=7, temperature=0.0)
    before = engine_module._advance._cache_size(), engine_module._start._cache_size()
    mocks.tiny_engine(1).generate_batch([PROMPT], max_tokens=7, temperature=0.0)
    assert before == (engine_module._advance._cache_size(), engine_module._start._cache_size())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads a CPU program")
@pytest.mark.parametrize("batch", [1, 4])
def test_the_loop_never_copies_a_cache(batch):
    """Copies of whole caches, a few per layer and token, once were half of the time."""
    cfg = GPTConfig("classic", 256, 320, 1, 2, 2, 64)
    engine = Engine(gpt_model(mocks.tiny_params(0, cfg), cfg), TOK)
    state, _ = engine._begin([PROMPT] * batch, 1, 250, 0)
    chosen, candidates = sampler.settings(0.0, None, None, 320)
    program = (
        engine_module._advance.lower(
            engine.model.params,
            state,
            np.int32(8),
            sampler.row_keys(0, batch),
            chosen,
            engine._marks,
            decoder=engine.model.decoder,
            candidates=candidates,
        )
        .compile()
        .as_text()
    )
    layout = f"f32[{','.join(map(str, state.cache.k[0].shape))}]"
    assert layout in program
    assert re.findall(rf"= {re.escape(layout)}\S* copy\(", program) == []
