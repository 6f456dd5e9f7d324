"""How fast a model speaks over histories of growing length, and what it holds: sessions under the clock."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.engine import Engine, Marks, State
from megacontext_jax.infer.model import GPTDecoder, Model
from megacontext_jax.infer.session import Session

STRETCH = 8  # tokens between two looks of the host
MESSAGE = 16  # tokens of the message whose first answer token is waited for


class Endless(Engine):
    """No token ends an answer, so that as much is said as is to be measured."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self._marks = Marks(*(np.int32(-2),) * 3)


class Timed:
    """Between two stretches: what the session does there, and when."""

    def __init__(self, session: Session):
        self._session = session
        self.stretches: list[float] = []  # seconds, the host's share included
        self.settling: list[float] = []
        self._last = time.perf_counter()

    def room(self) -> int:
        return self._session.room()

    def settle(self, state: State, token_NB: np.ndarray) -> State:
        start = time.perf_counter()
        state = self._session.settle(state, token_NB)
        jax.block_until_ready(state.logits_BV)
        now = time.perf_counter()
        self.settling.append(now - start)
        self.stretches.append((now - self._last) / len(token_NB))
        self._last = now
        return state


class Card(NamedTuple):
    """What can be said before anything runs."""

    parameters: int
    weight_bytes: int
    cache_bytes: int
    slots: int
    bandwidth: float  # bytes per second, measured by reading as many

    def lines(self) -> list[str]:
        floor_ms = 1e3 * (self.weight_bytes + self.cache_bytes) / self.bandwidth
        return [
            f"weights {self.weight_bytes / 1e6:.2f} MB ({self.parameters / 1e6:.2f} M), cache {self.cache_bytes / 1e6:.2f} MB in "
            f"{self.slots:,} slots ({self.cache_bytes / max(1, self.slots):,.0f} bytes per entry)",
            f"reading both takes {floor_ms:.3f} ms at {self.bandwidth / 1e9:.1f} GB/s: the floor of a token",
        ]


def card(chat: ChatModel) -> Card:
    memory = chat.memory()
    weights = jax.tree.leaves(memory.model.params)
    cache = jax.tree.leaves(memory.cache)
    slots = max((x.shape[2] for x in cache if x.ndim == 4), default=0)
    size = sum(x.nbytes for x in (*weights, *cache))
    return Card(
        sum(x.size for x in weights),
        sum(x.nbytes for x in weights),
        sum(x.nbytes for x in cache),
        slots,
        _bandwidth(max(size, 1 << 24)),
    )


def plain_twin(chat: ChatModel, slots: int) -> ChatModel:
    """The same weights with a plain cache of `slots` slots: what speaking costs without any memory."""
    cfg = replace(chat.model.decoder.cfg, attention="dense", sequence_len=slots)
    decoder = GPTDecoder(cfg, dtype=chat.model.decoder.dtype)
    return ChatModel(chat.tokenizer, f"{chat.name}, plain", Model(decoder, chat.model.params))


def _bandwidth(size: int) -> float:
    """Bytes read per second by a sum over an array of this size, the best of some."""
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 4 * x.size / min(times)


def measure(chat: ChatModel, history: int, tokens: int, tick: Callable[[int], None] = lambda n: None) -> dict:
    """Reads a random history, then answers: one record of figures. Shapes are compiled before."""
    engine = Endless(chat.model, chat.tokenizer)
    rng = np.random.default_rng(history)
    with chat.new_session() as session:
        session.engine = engine
        start = time.perf_counter()
        while len(session) < history:
            n = min(history - len(session), 1 << 16)
            session.append(rng.integers(0, chat.model.decoder.vocab_size, n, np.uint32))
            session.read(tick)
        jax.block_until_ready(session.memory.logits_1V)
        read_s = time.perf_counter() - start

        first = []
        for _ in range(3):
            session.append(rng.integers(0, chat.model.decoder.vocab_size, MESSAGE, np.uint32))
            start = time.perf_counter()
            next(iter(session.answer(max_tokens=1, temperature=0.0, tokens_per_sync=1)))
            first.append(time.perf_counter() - start)

        times = Timed(session)
        session.read()
        draw = engine.draw(temperature=0.0, tokens_per_sync=STRETCH, max_tokens=tokens)
        for _ in engine.run(session.state(tokens), np.array([tokens], np.int32), draw, times):
            pass
        settling = np.array(times.settling[1:])
        gc.collect()  # nothing of earlier lengths is counted
        busy = settling > 4 * np.median(settling)  # a refocus changed something
        return {
            "kind": chat.kind,
            "history": history,
            "read_tokens_per_s": history / read_s,
            "ttft_s": float(np.median(first)),
            "ms_per_token_p50": 1e3 * float(np.percentile(times.stretches[1:], 50)),
            "ms_per_token_p99": 1e3 * float(np.percentile(times.stretches[1:], 99)),
            "ms_per_token_mean": 1e3 * float(np.mean(times.stretches[1:])),
            "refocus_ms": 1e3 * float(settling[busy].mean()) if chat.focus and busy.any() else 0.0,
            "settle_share": float(settling.sum() / (np.sum(times.stretches[1:]) * STRETCH)),
            "device_bytes": sum(x.nbytes for x in jax.live_arrays()),
            "tree_bytes": session.tree.nbytes,
        }


class Words:
    """Stands in for the tokenizer of a model that was never trained: marks at the end of the vocabulary."""

    digest = "none"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    @property
    def bos(self) -> int:
        return self.special("<|bos|>")

    def special(self, name: str) -> int:
        names = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
        tools = ("python_start", "python_end", "output_start", "output_end")
        return self.vocab_size - 1 - (*names, *tools).index(name.strip("<|>"))

    def encode(self, text: str) -> list[int]:
        return [byte % (self.vocab_size - 9) for byte in text.encode()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))
