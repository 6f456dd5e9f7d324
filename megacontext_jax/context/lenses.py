"""What scores the entries of a working context: LensNet, or one of the baselines it must beat.

A lens is a function of a `View` and gives scores [R, W] in (-1, 1): above 0 expand, below 0 collapse. All but
`learned` are standardised over their row, so that one allocator serves them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.context.layout import Layout, last_tokens, starts
from megacontext_jax.context.looks import standardised
from megacontext_jax.context.objective import ContextObjective


class View(NamedTuple):
    """What a lens may look at: the history of R rows and how it is shown."""

    objective: ContextObjective
    params: Any
    tables: tuple  # level tables of the history
    ids_RT: jax.Array  # its tokens
    layout: Layout
    key: jax.Array
    fact_RT: jax.Array | None = None  # bool: tokens that the answer needs, for the oracle


Lens = Callable[[View], jax.Array]


def learned(view: View):
    objective, layout = view.objective, view.layout
    return objective.scores(view.params, view.tables, layout, _mass(view))


def attention(view: View):
    """The mass that the model's own attention, from the newest entries, puts on an entry."""
    return standard(_mass(view), view.layout)


def _mass(view: View):
    objective = view.objective
    return objective.look(view.params, view.tables, view.ids_RT, view.layout)[1]


def lexical(view: View):
    """BM25 of the newest tokens, always raw, against the tokens under an entry (k1 = 1.2, b = 0: equal spans)."""
    layout, ids_RT = view.layout, view.ids_RT
    T = ids_RT.shape[1]
    block = view.objective.context.block
    begin_RW, end_RW = starts(layout, block), last_tokens(layout, block) + 1
    length_R1 = jnp.max(jnp.where(layout.valid_BW, end_RW, 0), axis=-1, keepdims=True)
    queries = view.objective.queries
    query_RQ = jnp.take_along_axis(ids_RT, jnp.maximum(length_R1 - queries + jnp.arange(queries), 0), axis=1)
    same_RQT = query_RQ[:, :, None] == ids_RT[:, None, :]
    running_RQT = jnp.cumsum(same_RQT, axis=-1)
    running_RQT = jnp.pad(running_RQT, ((0, 0), (0, 0), (1, 0)))
    tf_RQW = _at(running_RQT, jnp.clip(end_RW, 0, T)) - _at(running_RQT, jnp.clip(begin_RW, 0, T))
    return bm25(tf_RQW, layout)


def bm25(tf_RQW, layout: Layout):
    """Scores [R, W] of the entries from how often each of Q tokens occurs under them."""
    here_RQW = (tf_RQW > 0) & layout.valid_BW[:, None]
    n_R11 = layout.valid_BW.sum(-1)[:, None, None]
    df_RQ1 = here_RQW.sum(-1, keepdims=True)
    idf_RQ1 = jnp.log1p((n_R11 - df_RQ1 + 0.5) / (df_RQ1 + 0.5))
    score_RQW = idf_RQ1 * tf_RQW * 2.2 / (tf_RQW + 1.2)
    return standard(score_RQW.sum(1), layout)


def random(view: View):
    return standard(jax.random.normal(view.key, view.layout.level_BW.shape), view.layout)


def none(view: View):
    """No edits: the recency window of levels as it was laid out."""
    return jnp.zeros(view.layout.level_BW.shape)


def oracle(view: View):
    """Told where the facts are: expand what covers one, collapse the rest."""
    block = view.objective.context.block
    running_RT = jnp.pad(jnp.cumsum(view.fact_RT, axis=1), ((0, 0), (1, 0)))[:, None]
    T = view.fact_RT.shape[1]
    begin_RW = jnp.clip(starts(view.layout, block), 0, T)
    end_RW = jnp.clip(last_tokens(view.layout, block) + 1, 0, T)
    facts_RW = (_at(running_RT, end_RW) - _at(running_RT, begin_RW))[:, 0]
    return jnp.where(view.layout.valid_BW, jnp.where(facts_RW > 0, 1.0, -1.0), 0.0)


LENSES: dict[str, Lens] = {
    "learned": learned,
    "attention": attention,
    "lexical": lexical,
    "random": random,
    "oracle": oracle,
    "none": none,
}


def _at(x_RQT, index_RW):
    return jnp.take_along_axis(
        x_RQT, jnp.broadcast_to(index_RW[:, None], (*x_RQT.shape[:2], index_RW.shape[1])), 2
    )


def standard(score_RW, layout: Layout):
    """Scores in (-1, 1) of values of any scale."""
    return jnp.tanh(standardised(score_RW, layout))
