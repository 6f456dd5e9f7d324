"""Several sessions answer in one batch: their histories differ in length, the device takes a step for all of them."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.errors import UserError
from megacontext_jax.infer.engine import Draw, Event, State
from megacontext_jax.infer.session import Session


@jax.jit
def _split(tree):
    """The rows of a tree, one tree each."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], tree) for i in range(rows))


@jax.jit
def _join(rows):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


class _Together:
    """Between two stretches: every session keeps what it said, and refocuses when it is its time."""

    def __init__(self, sessions: Sequence[Session]):
        self._sessions = sessions
        self._left = [True] * len(sessions)  # those that still speak

    def room(self) -> int:
        return min(session.room() for session, left in zip(self._sessions, self._left, strict=True) if left)

    def settle(self, state: State, token_NB: np.ndarray) -> State:
        self._left = [left > 0 for left in jax.device_get(state.left_B).tolist()]
        rows, moved = _split((state.cache, state.logits_BV)), False
        for session, (cache, logits_1V), token_N in zip(self._sessions, rows, token_NB.T, strict=True):
            session.keep(cache, logits_1V, token_N)
            moved |= session.memory.cache is not cache
        if not moved:
            return state
        cache, logits_BV = _join([(s.memory.cache, s.memory.logits_1V) for s in self._sessions])
        return state._replace(cache=cache, logits_BV=logits_BV)


def answer_together(sessions: Sequence[Session], **options) -> Iterator[Event]:
    """As `Session.answer` for sessions of one `ChatModel`; the row of an event is the place of its session, which its draws
    depend on.

    Raises UserError for settings out of range, and if a session has nothing to answer.
    """
    if not sessions or any(not len(session) for session in sessions):
        raise UserError("There is a session with nothing to answer; add a message first.")
    return _run(sessions, sessions[0].engine.draw(**options))


def _run(sessions: Sequence[Session], draw: Draw) -> Iterator[Event]:
    for session in sessions:
        session.read()
    limits = [session.limit(draw.max_tokens) for session in sessions]
    states = [session.state(limit) for session, limit in zip(sessions, limits, strict=True)]
    engine = sessions[0].engine
    draw = draw._replace(seed=draw.seed + max(session.turns for session in sessions))
    try:
        yield from engine.run(_join(states), np.array(limits, np.int32), draw, _Together(sessions))
    finally:
        for session in sessions:
            session.end_turn()
