"""How fast a model speaks over histories of growing length, and what it holds: sessions under the clock."""

import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.engine import Engine, Marks, State
from megacontext_jax.infer.memory import Memory
from megacontext_jax.infer.model import GPTDecoder, Model
from megacontext_jax.infer.session import Session

STRETCH = 8  # tokens between two looks of the host
ROUND = 64  # tokens between a model's turn and its plain twin's
MESSAGE = 16  # tokens of the message whose first answer token is waited for


class Endless(Engine):
    """No token ends an answer, so that as much is said as is to be measured."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self._marks = Marks(*(np.int32(-2),) * 3)


class Speaker:
    """Says tokens after a history and times them, a round at a time."""

    def __init__(self, session: Session, tokens: int):
        session.read()
        engine, self._session = session.engine, session
        draw = engine.draw(temperature=0.0, tokens_per_sync=STRETCH, max_tokens=tokens)
        limit_1 = np.array([tokens], np.int32)
        self._answer = engine.stretches(session.state(tokens), limit_1, draw, between=self)
        self.stretches: list[tuple[int, float]] = []  # tokens, seconds; the host's share included
        self.settling: list[float] = []  # what the session does after each
        self.looked: list[bool] = []  # whether a lens looked then
        self._last = time.perf_counter()
        next(self._answer)  # compiled, and not timed
        self.stretches.clear()
        self.settling.clear()
        self.looked.clear()

    @property
    def ms_per_token(self) -> float:
        tokens, seconds = np.sum(self.stretches, axis=0)
        return 1e3 * float(seconds / tokens)

    def say(self, tokens: int) -> None:
        """About so many tokens more, fewer at the end of the answer."""
        self._last = time.perf_counter()
        done = sum(n for n, _ in self.stretches)
        for _ in self._answer:
            if sum(n for n, _ in self.stretches) >= done + tokens:
                return

    # what the engine asks of a session

    def room(self) -> int:
        return self._session.room()

    def settle(self, state: State, token_NB: np.ndarray) -> State:
        looks = self._looks()
        start = time.perf_counter()
        state = self._session.settle(state, token_NB)
        jax.block_until_ready(state.logits_BV)
        now = time.perf_counter()
        self.settling.append(now - start)
        self.looked.append(self._looks() > looks)
        self.stretches.append((len(token_NB), now - self._last))
        self._last = now
        return state

    def _looks(self) -> int:
        return self._session.memory.statistics().get("refocuses", 0)

    def per_token(self) -> np.ndarray:
        """Seconds of every token: equal shares of a stretch, and what follows it weighs on the next token alone."""
        return np.concatenate(
            [
                [(seconds - settling) / n + settling] + [(seconds - settling) / n] * (n - 1)
                for (n, seconds), settling in zip(self.stretches, self.settling, strict=True)
            ]
        )


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
    slots = slots_of(memory)
    size = sum(x.nbytes for x in (*weights, *cache))
    return Card(
        sum(x.size for x in weights),
        sum(x.nbytes for x in weights),
        sum(x.nbytes for x in cache),
        slots,
        _bandwidth(max(size, 1 << 24)),
    )


def slots_of(memory: Memory) -> int:
    """Entries that a layer's cache holds."""
    return max((x.shape[2] for x in jax.tree.leaves(memory.cache) if x.ndim == 4), default=0)


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
    """Reads a random history, then answers: one record of figures. Shapes are compiled before.

    A model with a memory takes turns with its plain twin, so that both speak on the same machine.
    """
    rng = np.random.default_rng(history)
    with new_session(chat) as session:
        start = time.perf_counter()
        while len(session) < history:
            session.append(_words(chat, rng, min(history - len(session), 1 << 16)))
            session.read(tick)
        jax.block_until_ready(session.memory.logits_1V)
        read_s = time.perf_counter() - start

        first = []
        for _ in range(3):
            session.append(_words(chat, rng, MESSAGE))
            start = time.perf_counter()
            next(iter(session.answer(max_tokens=1, temperature=0.0, tokens_per_sync=1)))
            first.append(time.perf_counter() - start)

        refocuses = Counter(session.memory.edits) if chat.focus else Counter()
        speaker = Speaker(session, tokens)
        beside = None if chat.kind == "plain" else Beside(plain_twin(chat, slots_of(session.memory)))
        for _ in range(max(1, tokens // ROUND)):
            speaker.say(ROUND)
            if beside:
                beside.say(ROUND)
        plain_ms = beside.close() if beside else None
        gc.collect()  # nothing of earlier lengths is counted
        device_bytes = sum(x.nbytes for x in jax.live_arrays())
        per_token, settling = speaker.per_token(), np.array(speaker.settling)
        looked = np.array(speaker.looked)
        record = {
            "kind": chat.kind,
            "history": history,
            "read_tokens_per_s": history / read_s,
            "ttft_s": float(np.median(first)),
            "ms_per_token_p50": 1e3 * float(np.percentile(per_token, 50)),
            "ms_per_token_p99": 1e3 * float(np.percentile(per_token, 99)),
            "ms_per_token_mean": speaker.ms_per_token,
            "tokens_per_s": 1e3 / speaker.ms_per_token,
            "refocus_ms": 1e3 * float(settling[looked].mean()) if looked.any() else 0.0,
            "settle_share": float(settling.sum() / sum(seconds for _, seconds in speaker.stretches)),
            "device_bytes": device_bytes,
            "tree_bytes": session.tree.nbytes,
        }
        if chat.focus:
            made = Counter(session.memory.edits)
            made.subtract(refocuses)
            record |= {name: made[name] for name in ("refocuses", "unpaid", "expands", "collapses")}
        if plain_ms:
            record |= {"plain_ms_per_token_mean": plain_ms, "times_plain": speaker.ms_per_token / plain_ms}
        return record


class Beside:
    """The plain twin, which begins anew whenever its window is full."""

    def __init__(self, twin: ChatModel):
        self._twin = twin
        self._tokens, self._history = plain_plan(twin, twin.model.decoder.window)
        self._times: list[tuple[int, float]] = []
        self._said = self._tokens
        self._session: Session | None = None

    def say(self, tokens: int) -> None:
        if self._said + tokens > self._tokens:
            self._begin()
        self._said += tokens
        self._speaker.say(tokens)

    def _begin(self) -> None:
        self._end()
        self._session = new_session(self._twin)
        self._session.append(_words(self._twin, np.random.default_rng(0), self._history))
        self._speaker = Speaker(self._session, self._tokens)
        self._said = STRETCH

    def _end(self) -> None:
        if self._session:
            self._times += self._speaker.stretches
            self._session.close()

    def close(self) -> float:
        """Lets go of everything; milliseconds per token over all that was said."""
        self._end()
        self._session = self._speaker = None
        tokens, seconds = np.sum(self._times, axis=0)
        return 1e3 * float(seconds / tokens)


def new_session(chat: ChatModel) -> Session:
    """A session whose answers do not end."""
    session = chat.new_session()
    session.engine = Endless(chat.model, chat.tokenizer)
    return session


def plain_plan(chat: ChatModel, tokens: int) -> tuple[int, int]:
    """(tokens to time, history before them) that fill the window of a plain model."""
    window = chat.model.decoder.window
    tokens = min(tokens, window // 2)
    return tokens, max(1, window - tokens - 3 * (MESSAGE + 1) - 1)


def _words(chat: ChatModel, rng, n: int) -> np.ndarray:
    return rng.integers(0, chat.model.decoder.vocab_size, n, np.uint32)


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
