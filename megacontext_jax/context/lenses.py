"""What scores the entries of a working context: LensNet, or one of the baselines it must beat.

A lens is a function of a `View` and gives scores [R, W] in (-1, 1): above 0 expand, below 0 collapse. All but
`learned` are standardised over their row, so that one allocator serves them all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megacontext_jax.context.entries import layout_entries
from megacontext_jax.context.layout import Layout, last_tokens, starts
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.model.gpt import close_block, enter_block, layer_params, qkv

QUERIES = 16  # newest tokens that ask: their attention, their words


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
    return view.objective.scores(view.params, view.tables, view.layout)


def attention(view: View):
    """The mass that the model's own attention, from the newest entries, puts on an entry."""
    objective, layout = view.objective, view.layout
    cfg, ctx = objective.cfg, objective.context
    entries = layout_entries(
        view.params, cfg, view.tables, view.ids_RT, layout, block=ctx.block, positions=ctx.positions
    )
    return _standard(attention_mass(view.params, cfg, entries, layout), layout)


def lexical(view: View):
    """BM25 of the newest tokens against the tokens under an entry (k1 = 1.2, b = 0: spans are of equal length)."""
    layout, ids_RT = view.layout, view.ids_RT
    T = ids_RT.shape[1]
    block = view.objective.context.block
    begin_RW, end_RW = starts(layout, block), last_tokens(layout, block) + 1
    query_RQ = ids_RT[:, -QUERIES:]
    same_RQT = query_RQ[:, :, None] == ids_RT[:, None, :]
    running_RQT = jnp.cumsum(same_RQT, axis=-1)
    running_RQT = jnp.pad(running_RQT, ((0, 0), (0, 0), (1, 0)))
    tf_RQW = _at(running_RQT, jnp.clip(end_RW, 0, T)) - _at(running_RQT, jnp.clip(begin_RW, 0, T))
    here_RQW = (tf_RQW > 0) & layout.valid_BW[:, None]
    n_R11 = layout.valid_BW.sum(-1)[:, None, None]
    df_RQ1 = here_RQW.sum(-1, keepdims=True)
    idf_RQ1 = jnp.log1p((n_R11 - df_RQ1 + 0.5) / (df_RQ1 + 0.5))
    score_RQW = idf_RQ1 * tf_RQW * 2.2 / (tf_RQW + 1.2)
    return _standard(score_RQW.sum(1), layout)


def random(view: View):
    return _standard(jax.random.normal(view.key, view.layout.level_BW.shape), view.layout)


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


def attention_mass(params, cfg, entries, layout: Layout, queries: int = QUERIES):
    """Mean over layers, heads and the newest `queries` valid entries of the attention on each entry, [R, W]."""
    x_RWC, rope, values = entries
    x0_RWC, W = x_RWC, x_RWC.shape[1]
    layers, ve_layers = layer_params(params), cfg.value_embed_layers()
    count_R1 = layout.count_B[:, None]
    index_W = jnp.arange(W)
    newest_RW = (index_W < count_R1) & (index_W >= count_R1 - queries)
    visible_RWW = (index_W[:, None] >= index_W) & layout.valid_BW[:, None, :]
    mass_RW = jnp.zeros((x_RWC.shape[0], W))
    for i in range(cfg.n_layer):
        layer = {name: w[i] for name, w in layers.items()}
        value = {name: w[ve_layers.index(i)] for name, w in values.items()} if i in ve_layers else None
        x_RWC = enter_block(layer, x_RWC, x0_RWC)
        q, k, v = qkv(layer, cfg, x_RWC, rope, value)
        k, v = (jnp.repeat(y, cfg.n_head // cfg.n_kv_head, axis=2) for y in (k, v))
        s_RHWW = jnp.einsum("rthd,rshd->rhts", q, k, preferred_element_type=jnp.float32)
        s_RHWW = jnp.where(visible_RWW[:, None], s_RHWW / math.sqrt(cfg.head_dim), -1e30)
        p_RHWW = jax.nn.softmax(s_RHWW, axis=-1)
        mass_RW += jnp.where(newest_RW[:, None, :, None], p_RHWW, 0.0).sum((1, 2))
        x_RWC = close_block(layer, x_RWC, jnp.einsum("rhts,rshd->rthd", p_RHWW.astype(v.dtype), v))
    return mass_RW / (cfg.n_layer * cfg.n_head * queries)


def _at(x_RQT, index_RW):
    return jnp.take_along_axis(
        x_RQT, jnp.broadcast_to(index_RW[:, None], (*x_RQT.shape[:2], index_RW.shape[1])), 2
    )


def _standard(score_RW, layout: Layout):
    """Squashed deviations from the mean, raw entries and gists each among their like."""
    out = jnp.zeros_like(score_RW)
    for kind_RW in (layout.level_BW == 0, layout.level_BW > 0):
        mask = kind_RW & layout.valid_BW
        n = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        centred = jnp.where(mask, score_RW - jnp.where(mask, score_RW, 0.0).sum(-1, keepdims=True) / n, 0.0)
        spread = jnp.sqrt(jnp.square(centred).sum(-1, keepdims=True) / n + 1e-12)
        out += jnp.where(mask, jnp.tanh(centred / spread), 0.0)
    return out
