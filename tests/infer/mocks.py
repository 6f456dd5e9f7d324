"""Models with known answers behind the decoder's interface, and small real ones."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.model import Model, Region, gpt_model
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.gpt import forward, init_params

TESTS = Path(__file__).parent.parent
NANOCHAT = json.loads((Path(__file__).parent / "nanochat_engine.json").read_text())


def tokenizer() -> Tokenizer:
    """nanochat's own small tokenizer: 320 tokens, the special ones at the end."""
    return Tokenizer.load(TESTS / "golden/pipeline_classic/base_dir/tokenizer")


class MockCache(NamedTuple):
    length_B: jax.Array
    last_B: jax.Array


class MockDecoder:
    """A decoder whose next logits are a function of (tokens read so far, the last of them).

    Counts how often its functions are traced, that is compiled.
    """

    def __init__(self, logits_fn, vocab_size: int = 320, window: int = 256):
        self.logits_fn = logits_fn
        self.vocab_size = vocab_size
        self.window = window
        self.traced = {"prefill": 0, "decode_step": 0}

    def init_cache(self, batch, slots):
        assert slots <= self.window
        return MockCache(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def prefill(self, params, ids_BT, length_B, cache):
        self.traced["prefill"] += 1
        last_B = jnp.take_along_axis(ids_BT, length_B[:, None] - 1, axis=1)[:, 0]
        return self.logits_fn(length_B, last_B), MockCache(length_B, last_B)

    def extend(self, params, ids_BT, count_B, cache):
        length_B = cache.length_B + count_B
        last_B = jnp.take_along_axis(ids_BT, count_B[:, None] - 1, axis=1)[:, 0]
        return self.logits_fn(length_B, last_B), MockCache(length_B, last_B)

    def decode_step(self, params, ids_B, cache):
        self.traced["decode_step"] += 1
        cache = MockCache(cache.length_B + 1, ids_B)
        return self.logits_fn(*cache), cache

    def regions(self, tokens):
        return [Region(0, 0, tokens, tokens)]


def mock_chat(decoder) -> ChatModel:
    return ChatModel(tokenizer(), "mock, step 1", Model(decoder, None))


def one_hot_logits(token_B, vocab_size: int = 320):
    return 30.0 * jax.nn.one_hot(token_B, vocab_size)


def scripted(script, start: int, **options) -> MockDecoder:
    """Says `script[i]` after `start + i` tokens, whatever those were."""
    script = jnp.asarray(script)
    return MockDecoder(lambda length_B, _: one_hot_logits(script[length_B - start]), **options)


def mock_engine(decoder: MockDecoder) -> Engine:
    return Engine(Model(decoder, None), tokenizer())


def uniform() -> MockDecoder:
    return MockDecoder(lambda length_B, _: jnp.zeros((length_B.shape[0], 320)))


TINY = GPTConfig(arch="classic", sequence_len=64, vocab_size=320, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)


def tiny_params(seed: int = 0, cfg: GPTConfig = TINY) -> dict:
    """Weights large enough for decisive logits (classic starts its projections at zero)."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def tiny_engine(seed: int = 0) -> Engine:
    return Engine(gpt_model(tiny_params(seed), TINY), tokenizer())


_forward = jax.jit(forward, static_argnums=1)


def naive_greedy(params, cfg: GPTConfig, prompt, n: int) -> list[int]:
    """The whole sequence anew for every token."""
    row = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, cfg.sequence_len), np.int32)
        padded[0, : len(row)] = row
        row.append(int(np.argmax(_forward(params, cfg, padded)[0, len(row) - 1])))
    return row
