"""Gist attention in plain XLA, tile by tile: memory O(T), work proportional to the keys that are seen.

A tile is a run of tokens with the gist rows that end in it. Its keys are one contiguous window per level, laid side
by side, so that a tile is one product, one softmax and one product. The backward pass computes the probabilities
again from the saved log-sum-exp and adds into the gradients of the windows in place. Tiles with windows of about the
same size run in one loop, so that what is compiled does not grow with the sequence. Rows of the upper levels, whose
spans are longer than a tile, are few: each is a tile of its own.

Shape suffixes: B batch, K key heads, G queries per key head, H = K G, N = B K, T rows of a level, Q queries of a
tile, W keys of a tile, D head size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.reference import NEG
from kernels_pallas.spec import GistSpec

TILE = 128  # tokens of a tile, about
WASTE = (
    1.25  # a loop goes on as long as its windows are no more than this much larger than its first tile needs
)


def gist_attention_xla(q, k, v, spec: GistSpec, segment_ids, scale: float) -> tuple:
    """Per-level outputs. Scores, softmax and sums are float32."""
    B, _, H, D = q[0].shape
    K = k[0].shape[2]
    q_NGTD = tuple(x.transpose(0, 2, 1, 3).reshape(B * K, H // K, -1, D) for x in q)
    k_NTD, v_NTD = (tuple(x.transpose(0, 2, 1, 3).reshape(B * K, -1, D) for x in xs) for xs in (k, v))
    out = _attention(q_NGTD, k_NTD, v_NTD, _documents(segment_ids, spec), spec, scale)
    return tuple(o_NGTD.reshape(B, H, -1, D).transpose(0, 2, 1, 3) for o_NGTD in out)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, documents, spec: GistSpec, scale: float):
    return _forward(q, k, v, documents, spec, scale)[0]


def _forward(q, k, v, documents, spec: GistSpec, scale: float):
    def step(tile: Tile, out):
        o, lse = out
        s_NGQW = _scores(tile, q, k, documents, scale)[0]
        top_NGQ1 = s_NGQW.max(
            -1, keepdims=True
        )  # no row is without a key: it sees the last token of its span
        e_NGQW = jnp.exp(s_NGQW - top_NGQ1)
        sum_NGQ1 = e_NGQW.sum(-1, keepdims=True)
        o_NGQD = _product(e_NGQW.astype(v[0].dtype), tile.keys(v), 3, 1) / sum_NGQ1
        return tile.put(o, o_NGQD), tile.put(lse, top_NGQ1 + jnp.log(sum_NGQ1))

    o = tuple(jnp.zeros_like(x) for x in q)
    lse = tuple(jnp.zeros((*x.shape[:3], 1), jnp.float32) for x in q)
    o, lse = _each_tile(spec, q[0].shape[2], step, (o, lse))
    return o, (q, k, v, documents, o, lse)


def _backward(spec: GistSpec, scale: float, saved, do):
    q, k, v, documents, o, lse = saved

    def step(tile: Tile, grads):
        dq, dk, dv = grads
        s_NGQW, q_NGQD, k_NWD = _scores(tile, q, k, documents, scale)
        do_NGQD, o_NGQD = tile.queries(do), tile.queries(o)
        delta_NGQ1 = (do_NGQD.astype(jnp.float32) * o_NGQD.astype(jnp.float32)).sum(-1, keepdims=True)
        p_NGQW = jnp.exp(s_NGQW - tile.queries(lse))
        dp_NGQW = _product(do_NGQD, tile.keys(v), 3, 2)
        ds_NGQW = (p_NGQW * (dp_NGQW - delta_NGQ1)).astype(q_NGQD.dtype)
        dq_NGQD = _product(ds_NGQW, k_NWD, 3, 1) * scale
        return (
            tile.put(dq, dq_NGQD),
            tile.add(dk, _sum_over_queries(ds_NGQW, q_NGQD)),
            tile.add(dv, _sum_over_queries(p_NGQW.astype(do_NGQD.dtype), do_NGQD)),
        )

    dq = tuple(jnp.zeros_like(x) for x in q)
    dk, dv = (tuple(jnp.zeros(x.shape, jnp.float32) for x in xs) for xs in (k, v))
    dq, dk, dv = _each_tile(spec, q[0].shape[2], step, (dq, dk, dv))
    dk, dv = (tuple(g.astype(x.dtype) for g, x in zip(gs, xs, strict=True)) for gs, xs in ((dk, k), (dv, v)))
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _scores(tile: "Tile", q, k, documents, scale: float):
    """Masked scores, and what they are made of: scaled queries, keys."""
    q_NGQD, k_NWD = tile.queries(q) * scale, tile.keys(k)
    s_NGQW = _product(q_NGQD, k_NWD, 3, 2)
    seen = tile.seen(documents)
    s_BKGQW = s_NGQW.reshape(seen.shape[0], -1, *s_NGQW.shape[1:])
    return jnp.where(seen, s_BKGQW, NEG).reshape(s_NGQW.shape), q_NGQD, k_NWD


def _product(x_NGQX, y_NYZ, x_axis: int, y_axis: int):
    """Contracts an axis of each; written out in the order in which XLA on CPUs copies nothing."""
    N, G, Q, X = x_NGQX.shape
    out = jax.lax.dot_general(
        x_NGQX.reshape(N, G * Q, X),
        y_NYZ,
        (((2,), (y_axis,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(N, G, Q, -1)


def _sum_over_queries(x_NGQW, y_NGQD):
    N, G, Q, W = x_NGQW.shape
    return jax.lax.dot_general(
        x_NGQW.reshape(N, G * Q, W),
        y_NGQD.reshape(N, G * Q, -1),
        (((1,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )


def _documents(segment_ids, spec: GistSpec):
    """Of every row of every level, [B, T_l]: the document that it asks from (its last token's) and that it tells of."""
    if segment_ids is None:
        return None
    spans = [spec.block**level for level in range(spec.levels + 1)]
    rows = spec.rows(segment_ids.shape[1])
    asking = tuple(segment_ids[:, span - 1 :: span] for span in spans)
    return asking, tuple(segment_ids[:, ::span][:, :n] for span, n in zip(spans, rows, strict=True))


# --- Tiles ----------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where tiles are: integer arrays, [N, ...] for the N tiles of a run."""

    query: np.ndarray  # [..., L + 1] first query row of every level
    key: np.ndarray  # [..., L + 1] first key row
    first: np.ndarray  # [..., L + 1, Q] the keys that each query sees
    stop: np.ndarray


class Run(NamedTuple):
    """Tiles that are alike but for their places."""

    rows: dict[int, int]  # queries of a tile, by level
    width: tuple[int, ...]  # key rows of a tile, by level
    places: Places


class Tile(NamedTuple):
    """One tile: reads and writes its slices of per-level arrays."""

    rows: dict[int, int]
    width: tuple[int, ...]
    places: Places

    def queries(self, xs, axis: int = 2):
        """Per-level [N, G, T, ...] to [N, G, Q, ...]."""
        parts = [_slice(xs[m], self.places.query[m], n, axis) for m, n in self.rows.items()]
        return jnp.concatenate(parts, axis)

    def put(self, xs, x_NGQD):
        """Writes what belongs to the queries: the reverse of `queries`."""
        xs, at = list(xs), 0
        for m, n in self.rows.items():
            part = x_NGQD[:, :, at : at + n].astype(xs[m].dtype)
            xs[m] = jax.lax.dynamic_update_slice_in_dim(xs[m], part, self.places.query[m], axis=2)
            at += n
        return tuple(xs)

    def keys(self, xs):
        """Per-level [N, T, ...] to [N, W, ...]."""
        parts = [_slice(xs[m], self.places.key[m], n, 1) for m, n in enumerate(self.width) if n]
        return jnp.concatenate(parts, axis=1)

    def add(self, xs, x_NWD):
        """Adds what belongs to the keys: the transpose of `keys`."""
        xs, at = list(xs), 0
        for m, n in enumerate(self.width):
            if n:
                part = _slice(xs[m], self.places.key[m], n, 1) + x_NWD[:, at : at + n]
                xs[m] = jax.lax.dynamic_update_slice_in_dim(xs[m], part, self.places.key[m], axis=1)
            at += n
        return tuple(xs)

    def seen(self, documents):
        """Which keys each query sees, [B or 1, 1, 1, Q, W]."""
        seen = []
        for m, n in enumerate(self.width):
            row_W = self.places.key[m] + jnp.arange(n)
            first_Q1, stop_Q1 = self.places.first[m][:, None], self.places.stop[m][:, None]
            seen.append((row_W >= first_Q1) & (row_W < stop_Q1))
        seen_BQW = jnp.concatenate(seen, axis=1)[None]
        if documents is not None:
            asking, told = documents
            seen_BQW &= self.queries(asking, axis=1)[:, :, None] == self.keys(told)[:, None]
        return seen_BQW[:, None, None]


def _slice(x, start, rows: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, start, rows, axis)


def _each_tile(spec: GistSpec, tokens: int, step, carry):
    """carry = step(tile, carry) for all tiles of all levels."""
    for rows, width, places in _runs(spec, tokens):

        def one(carry, place, rows=rows, width=width):
            return step(Tile(rows, width, place), carry), None

        if len(places.query) == 1:
            carry, _ = one(carry, Places(*(x[0] for x in places)))
        else:
            carry, _ = jax.lax.scan(one, carry, jax.tree.map(jnp.asarray, places))
    return carry


def _runs(spec: GistSpec, tokens: int) -> list[Run]:
    """All queries of all levels, in runs of tiles."""
    r, length = spec.block, spec.rows(tokens)
    joined = max(level for level in range(1, spec.levels + 1) if r**level <= max(TILE, r))
    size = r**joined * max(1, round(TILE / r**joined))
    whole, rest = divmod(tokens, size)
    rows = {level: size // r**level for level in range(joined + 1)}
    runs = _split(spec, length, rows, {level: np.arange(whole) * n for level, n in rows.items()})
    if rest:
        begin = {level: whole * n for level, n in rows.items()}
        rest = {level: length[level] - begin[level] for level in rows if length[level] > begin[level]}
        runs += _split(spec, length, rest, {level: np.array([begin[level]]) for level in rest})
    for level in range(joined + 1, spec.levels + 1):
        runs += _split(spec, length, {level: 1}, {level: np.arange(length[level])})
    return runs


def _split(spec: GistSpec, length, rows: dict[int, int], begin: dict[int, np.ndarray]) -> list[Run]:
    """Runs of tiles with `rows` queries each, from rows `begin`; a run ends where windows would get much larger."""
    ranges = [spec.key_ranges(level, begin[level][:, None] + np.arange(n)) for level, n in rows.items()]
    levels = range(spec.levels + 1)
    # [N, L + 1, Q]
    first, stop = (
        np.stack([np.concatenate([x[m][end] for x in ranges], axis=1) for m in levels], axis=1)
        for end in (0, 1)
    )
    low, high = first.min(2), stop.max(2)
    query = np.stack([begin.get(level, 0 * low[:, 0]) for level in levels], axis=1)
    runs, at = [], 0
    while at < len(low):
        end, width = at, np.zeros_like(low[0])
        while end < len(low):
            wider = np.maximum(width, high[end] - low[end])
            if end > at and wider.sum() > WASTE * (high - low)[at].sum():
                break
            end, width = end + 1, wider
        # a window that would reach behind the last row begins earlier
        key = np.minimum(low, np.asarray(length) - width)
        places = Places(*(x[at:end].astype(np.int32) for x in (query, key, first, stop)))
        runs.append(Run(rows, tuple(width.tolist()), places))
        at = end
    return runs
