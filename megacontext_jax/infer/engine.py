"""Generation for a batch of prompts, the loop on the device.

One compiled `while_loop` produces up to `tokens_per_sync` tokens per row between two looks of the host. It
returns early when every row is finished or one has called the tool; the host answers the call with tokens
that the row is then forced to say, so that the cache sees them. Shapes are rounded up (`bucket`), so that
prompts of any length share a few compiled programs.

Suffixes: P prompts, B rows (prompts x samples), T tokens, V vocabulary, Q places for forced tokens, N steps
between syncs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.errors import UserError
from megacontext_jax.infer import sampler
from megacontext_jax.infer.calculator import MAX_RESULT
from megacontext_jax.infer.model import Decoder, Model
from megacontext_jax.infer.tools import ToolCalls

MAX_SYNC = 64  # N, a static extent
QUEUE = MAX_RESULT + 2  # a tool's answer (at most a token per character) and its two brackets
NO_TOKEN = -1


class Event(NamedTuple):
    """One token of one row; rows count prompt by prompt, the samples of a prompt next to each other."""

    row: int
    token: int
    sampled: bool  # False: forced, the answer of a tool
    stop: str | None  # on the row's last token: "end" (terminal token), "length" or "window"


class Draw(NamedTuple):
    """What `Engine.draw` has checked."""

    chosen: sampler.Settings
    candidates: int
    seed: int
    tokens_per_sync: int
    max_tokens: int | None


class Marks(NamedTuple):
    """Tokens that mean something to the loop."""

    assistant_end: int
    bos: int
    python_end: int


class State(NamedTuple):
    """What the loop carries.

    Attributes:
        cache: the model's cache; rows that are done no longer advance.
        logits_BV: float32, for the next token of each row.
        left_B: tokens each row may still say; 0 = done.
        said_B: tokens said so far; numbers the random draws of a row.
        calling_B: the row has just closed a tool call and waits for the host.
        queue_BQ, head_B, tail_B: forced tokens, those from head to tail are still to be said.
    """

    cache: Any
    logits_BV: jax.Array
    left_B: jax.Array
    said_B: jax.Array
    calling_B: jax.Array
    queue_BQ: jax.Array
    head_B: jax.Array
    tail_B: jax.Array


@partial(jax.jit, static_argnames=("decoder", "slots", "samples"))
def _start(params, ids_PT, length_P, left_B, *, decoder: Decoder, slots: int, samples: int) -> State:
    """Reads the prompts and copies each row's cache and logits for its samples."""
    P = ids_PT.shape[0]
    logits_PV, cache = decoder.prefill(params, ids_PT, length_P, decoder.init_cache(P, slots))
    if samples > 1:
        logits_PV, cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (logits_PV, cache))
    return new_state(cache, logits_PV, left_B)


def new_state(cache, logits_BV, left_B) -> State:
    """The state of rows that have been read and may say `left_B` tokens each."""
    B = logits_BV.shape[0]
    nothing_B = [jnp.zeros(B, jnp.int32) for _ in range(3)]  # an array each: they are donated
    return State(
        cache,
        logits_BV,
        left_B,
        nothing_B[0],
        jnp.zeros(B, bool),
        jnp.zeros((B, QUEUE), jnp.int32),
        *nothing_B[1:],
    )


def _of_active(active_B, after, before):
    """What a step has left, in the rows that took part in it. Keys and values (four axes) that the others have written
    stand behind their length, where the next token of theirs overwrites them."""

    def choose(new, old):
        if new.ndim > 3:
            return new
        return jnp.where(active_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, after, before)


def _sample_step(params, state: State, keys_B, chosen, marks: Marks, *, decoder: Decoder, candidates: int):
    """Every row says one token, forced or sampled, and reads it. Returns (state, token_B, forced_B)."""
    active_B = state.left_B > 0
    draw_B = jax.vmap(jax.random.fold_in)(keys_B, state.said_B) if candidates != 1 else keys_B
    sampled_B = sampler.sample(state.logits_BV, draw_B, chosen, candidates)
    forced_B = state.head_B < state.tail_B
    queued_B = jnp.take_along_axis(state.queue_BQ, state.head_B[:, None], axis=1, mode="clip")[:, 0]
    # a model that begins a new document ends its answer, which is what it then reads
    sampled_B = jnp.where(sampled_B == marks.bos, marks.assistant_end, sampled_B)
    token_B = jnp.where(forced_B, queued_B, sampled_B)

    logits_BV, cache = decoder.decode_step(params, token_B, state.cache)
    logits_BV, cache = _of_active(active_B, (logits_BV, cache), (state.logits_BV, state.cache))
    terminal_B = token_B == marks.assistant_end
    left_B = jnp.where(terminal_B, 0, state.left_B - 1)
    state = state._replace(
        cache=cache,
        logits_BV=logits_BV,
        left_B=jnp.where(active_B, left_B, 0),
        said_B=state.said_B + active_B,
        calling_B=active_B & (token_B == marks.python_end),
        head_B=state.head_B + (forced_B & active_B),
    )
    return state, jnp.where(active_B, token_B, NO_TOKEN), forced_B


@partial(jax.jit, static_argnames=("decoder", "candidates"), donate_argnames="state")
def _advance(params, state: State, steps, keys_B, chosen, marks: Marks, *, decoder: Decoder, candidates: int):
    """Up to `steps` (at most MAX_SYNC) tokens per row; fewer if all rows end or one calls the tool.

    Returns (state, number of steps, token_NB, forced_NB).
    """
    B = state.left_B.shape[0]
    out = jnp.full((MAX_SYNC, B), NO_TOKEN, jnp.int32), jnp.zeros((MAX_SYNC, B), bool)

    def go_on(carry):
        i, state, _ = carry
        return (i < steps) & (state.left_B > 0).any() & ~state.calling_B.any()

    def step(carry):
        i, state, (token_NB, forced_NB) = carry
        state, token_B, forced_B = _sample_step(
            params, state, keys_B, chosen, marks, decoder=decoder, candidates=candidates
        )
        return i + 1, state, (token_NB.at[i].set(token_B), forced_NB.at[i].set(forced_B))

    n, state, (token_NB, forced_NB) = jax.lax.while_loop(go_on, step, (jnp.int32(0), state, out))
    return state, n, token_NB, forced_NB


@partial(jax.jit, donate_argnames="state")
def _answer_calls(state: State, queue_BQ, count_B) -> State:
    """Lays the tools' answers into the queues (rows with a count) and lets the loop go on."""
    answered_B = count_B > 0
    return state._replace(
        calling_B=jnp.zeros_like(state.calling_B),
        queue_BQ=jnp.where(answered_B[:, None], queue_BQ, state.queue_BQ),
        head_B=jnp.where(answered_B, 0, state.head_B),
        tail_B=jnp.where(answered_B, count_B, state.tail_B),
    )


def bucket(n: int, limit: int) -> int:
    """`n` rounded up to 16, 24, 32, 48, 64, 96, ... (at most a half too much), but not beyond `limit`."""
    size = 16
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)


class Between(Protocol):
    """What a session does between two stretches of tokens."""

    def room(self) -> int:
        """Tokens that may follow before `settle` must be asked, at least 1."""

    def settle(self, state: State, token_NB: np.ndarray) -> State:
        """Keeps what was said (NO_TOKEN: nothing), before anybody hears of it; the state to go on with."""


class Engine:
    """Generates with a model and its tokenizer; holds no state between calls."""

    def __init__(self, model: Model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self._marks = Marks(
            *(tokenizer.special(f"<|{name}|>") for name in ("assistant_end", "bos", "python_end"))
        )

    @property
    def window(self) -> int:
        """Most tokens of one sequence, prompt and answer together."""
        return self.model.decoder.window

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        pad_rows: int = 0,
        **options,
    ) -> Iterator[Event]:
        """Streams the tokens of every row, step by step, until each has stopped.

        Args:
            prompts: token ids, of any lengths.
            num_samples: rows per prompt.
            pad_rows: idle prompts are added up to this many, so that a last, smaller batch need not be
                compiled anew.
            options: those of `draw`.

        Raises UserError at once for settings out of range and for a prompt that leaves no room in the window.
        """
        draw = self.draw(**options)
        self._check(prompts, num_samples)
        state, limit_B = self._begin(prompts, num_samples, draw.max_tokens, pad_rows)
        return self.run(state, limit_B, draw)

    def draw(
        self,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
        tokens_per_sync: int = 8,
    ) -> Draw:
        """How answers are drawn. Raises UserError for values out of range.

        Args:
            max_tokens: longest answer; None = what the window leaves.
            temperature, top_k, top_p: see `sampler.settings`.
            seed: the same seed gives the same tokens; row r draws the same whatever else is in the batch.
            tokens_per_sync: tokens per row between two looks of the host, at most 64.
        """
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"--max-tokens {max_tokens} must be at least 1.")
        if not 1 <= tokens_per_sync <= MAX_SYNC:
            raise UserError(f"tokens_per_sync {tokens_per_sync} must lie between 1 and {MAX_SYNC}.")
        chosen, candidates = sampler.settings(temperature, top_k, top_p, self.model.decoder.vocab_size)
        return Draw(chosen, candidates, seed, tokens_per_sync, max_tokens)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], **options
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Whole rows at once: (sequences with their prompts, masks), as nanochat returns them.

        A mask is 1 where the model chose the token, 0 on the prompt and on what a tool answered; the terminal
        token is dropped. Options are those of `generate`.
        """
        options = {"tokens_per_sync": MAX_SYNC} | options
        rows = [prompt for prompt in prompts for _ in range(options.get("num_samples", 1))]
        sequences = [list(prompt) for prompt in rows]
        masks = [[0] * len(prompt) for prompt in rows]
        for event in self.generate(prompts, **options):
            if event.stop != "end":
                sequences[event.row].append(event.token)
                masks[event.row].append(int(event.sampled))
        return sequences, masks

    def _check(self, prompts, num_samples: int) -> None:
        if num_samples < 1:
            raise UserError(f"--num-samples {num_samples} must be at least 1.")
        if not prompts:
            raise UserError("There is no prompt to generate from; give at least one.")
        for i, prompt in enumerate(prompts):
            name = f"Prompt {i + 1}" if len(prompts) > 1 else "The prompt"
            if not len(prompt):
                raise UserError(f"{name} is empty; begin it with the token <|bos|>.")
            if len(prompt) >= self.window:
                raise UserError(
                    f"{name} has {len(prompt):,} tokens and the model's window holds {self.window:,}, the "
                    "answer included; shorten it."
                )
            if not 0 <= min(prompt) <= max(prompt) < self.model.decoder.vocab_size:
                raise UserError(
                    f"{name} has token ids outside the model's vocabulary of "
                    f"{self.model.decoder.vocab_size:,}; use the tokenizer the model was trained with."
                )

    def _begin(self, prompts, num_samples: int, max_tokens: int | None, pad_rows: int):
        """The state after reading the prompts, and how many tokens each row may say."""
        idle = max(0, pad_rows - len(prompts))
        prompts = [*prompts, *([[self._marks.bos]] * idle)]
        longest = max(map(len, prompts))
        T = bucket(longest, self.window)
        slots = bucket(min(self.window, longest + (max_tokens or self.window)), self.window)
        ids_PT = np.zeros((len(prompts), T), np.int32)
        for row, prompt in zip(ids_PT, prompts, strict=True):
            row[: len(prompt)] = prompt
        length_P = np.array([len(prompt) for prompt in prompts], np.int32)
        room_P = np.minimum(self.window - length_P, max_tokens or self.window)
        room_P[len(prompts) - idle :] = 0
        limit_B = np.repeat(room_P, num_samples).astype(np.int32)
        state = _start(
            self.model.params,
            ids_PT,
            length_P,
            limit_B,
            decoder=self.model.decoder,
            slots=slots,
            samples=num_samples,
        )
        return state, limit_B

    def run(self, state: State, limit_B, draw: Draw, between: Between | None = None) -> Iterator[Event]:
        """Streams what rows say that have been read, at most `limit_B` tokens each; consumes `state`."""
        for events in self.stretches(state, limit_B, draw, between):
            yield from events

    def stretches(
        self, state: State, limit_B, draw: Draw, between: Between | None = None
    ) -> Iterator[list[Event]]:
        """`run`, with all that was said between two looks of the host at once."""
        advance = partial(_advance, decoder=self.model.decoder, candidates=draw.candidates)
        keys_B = sampler.row_keys(draw.seed, len(limit_B))
        tools = [ToolCalls(self.tokenizer) for _ in limit_B]
        left_B = np.array(limit_B)
        while left_B.any():
            steps = draw.tokens_per_sync if between is None else min(draw.tokens_per_sync, between.room())
            state, n, token_NB, forced_NB = advance(
                self.model.params, state, np.int32(steps), keys_B, draw.chosen, self._marks
            )
            n, token_NB, forced_NB = jax.device_get((n, token_NB, forced_NB))
            events, answers = [], {}
            for token_B, forced_B in zip(token_NB[:n], forced_NB[:n], strict=True):
                for row in np.flatnonzero(token_B != NO_TOKEN):
                    token = int(token_B[row])
                    left_B[row] -= 1
                    stop = None
                    if token == self._marks.assistant_end:
                        left_B[row], stop = 0, "end"
                    elif not left_B[row]:
                        stop = "length" if limit_B[row] == draw.max_tokens else "window"
                    if answer := tools[row].push(token):
                        answers[row] = answer
                    events.append(Event(int(row), token, not forced_B[row], stop))
            state = self._answer(state, answers, last_B=token_NB[n - 1])
            if between is not None:
                state = between.settle(state, token_NB[:n])
            yield events

    def _answer(self, state: State, answers: dict[int, list[int]], last_B) -> State:
        """Lets the loop go on after a tool call, with the answers queued."""
        if self._marks.python_end not in last_B:
            return state
        queue_BQ = np.zeros((len(last_B), QUEUE), np.int32)
        count_B = np.zeros(len(last_B), np.int32)
        for row, answer in answers.items():
            queue_BQ[row, : len(answer)] = answer
            count_B[row] = len(answer)
        return _answer_calls(state, queue_BQ, count_B)
