"""Decoding with gist attention: rings of rows per layer, and a gist row through all layers when a block is full.

Shape suffixes as in `context.gist_rows` and `kernels_pallas.decode`; L levels, r tokens per block.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.decode import (
    GistCache,
    append,
    fill,
    gist_decode,
    gist_extend,
    init_gist_cache,
    new_rows,
)
from megacontext_jax.context import gistnet
from megacontext_jax.context.gist_rows import (
    GistRows,
    row_attention,
    row_centres,
    row_entries,
    row_spread,
    split_levels,
)
from megacontext_jax.context.positions import gaussian_rope, span_centres
from megacontext_jax.infer.model import Model, Region, prepare_params
from megacontext_jax.model import decode, gpt


class RowCache(NamedTuple):
    """What a sequence leaves behind for the tokens to come."""

    layers: tuple[GistCache, ...]
    blocks: tuple[jax.Array, ...]  # per level below the last: rows [B, r, C] of the block that is filling
    last_BC: jax.Array  # embedding of the last token, for the smear; zeros before the first
    length_B: jax.Array  # tokens seen


@dataclass(frozen=True)
class GistDecoder:
    """A `Decoder` over the prepared weights of the base model and GistNet's."""

    objective: GistRows

    @property
    def cfg(self):
        return self.objective.cfg

    @property
    def vocab_size(self) -> int:
        return self.cfg.vocab_size

    @property
    def window(self) -> int:
        return self.cfg.sequence_len

    @property
    def dtype(self):
        return self.objective.base.dtype

    def init_cache(self, batch: int, slots: int) -> RowCache:
        cfg = self.cfg
        layer = partial(init_gist_cache, cfg.gist_spec, batch, slots, cfg.n_kv_head, cfg.head_dim, self.dtype)
        shape = batch, cfg.gist_block, cfg.n_embd
        return RowCache(
            tuple(layer() for _ in range(cfg.n_layer)),
            tuple(jnp.zeros(shape, self.dtype) for _ in range(cfg.gist_levels)),
            jnp.zeros((batch, cfg.n_embd), self.dtype),
            jnp.zeros(batch, jnp.int32),
        )

    def prefill(self, params, ids_BT, length_B, cache: RowCache):
        cfg, spec = self.cfg, self.cfg.gist_spec
        tables = self.objective.rows(params, ids_BT)
        entries = row_entries(params, cfg, tables, ids_BT)
        sizes = spec.rows(ids_BT.shape[1])
        attention = row_attention(spec, sizes, self.objective.implementation)
        more = sum(sizes[1:])
        raw_R = jnp.arange(sum(sizes)) < ids_BT.shape[1]
        ids_BR = jnp.pad(ids_BT, ((0, 0), (0, more)))
        x_BRC = x0_BRC = entries.x_BTC
        kept_BRC, layers = None, []
        for i, layer, _, value in decode.layer_weights(params, cfg, ids_BR, self.dtype):
            if value is not None:
                value["rows"] = value["rows"] * raw_R[:, None].astype(self.dtype)
            x_BRC = gpt.enter_block(layer, x_BRC, x0_BRC)
            q, k, v = gpt.qkv(layer, cfg, x_BRC, entries.rope, value, entries.gists)
            layers.append(
                fill(cache.layers[i], split_levels(k, sizes), split_levels(v, sizes), length_B, spec)
            )
            x_BRC = gpt.close_block(layer, x_BRC, attention(q, k, v))
            kept_BRC = x_BRC if i == cfg.n_layer // 2 else kept_BRC
        last_B11 = (length_B - 1)[:, None, None]
        x_B1C, kept_B1C = (jnp.take_along_axis(x, last_B11, axis=1) for x in (x_BRC, kept_BRC))
        blocks = tuple(
            self._filling(table_BSC, length_B // cfg.gist_block**level)
            for level, table_BSC in enumerate(tables[:-1])
        )
        last_BC = gpt.embed(params, jnp.take_along_axis(ids_BT, last_B11[..., 0], axis=1)[:, 0], self.dtype)
        logits_BV = decode.head_logits(params, cfg, x_B1C, kept_B1C)
        return logits_BV, RowCache(tuple(layers), blocks, last_BC, length_B)

    def _filling(self, table_BSC, rows_B):
        """The newest rows of a level that fill no block yet, at the beginning of one, [B, r, C]."""
        r = self.cfg.gist_block
        if table_BSC.shape[1] == 0:
            return jnp.zeros((table_BSC.shape[0], r, self.cfg.n_embd), self.dtype)
        index_Br = (rows_B // r * r)[:, None] + jnp.arange(r)
        return jnp.take_along_axis(table_BSC, index_Br[..., None], axis=1, mode="clip")

    def extend(self, params, ids_BT, count_B, cache: RowCache):
        """Append right-padded tokens, `count_B` of them valid, at least one, wherever in a block they begin.

        Returns the logits [B, V] after the last of them, and the cache.
        """
        cfg, spec = self.cfg, self.cfg.gist_spec
        start_B, T = cache.length_B, ids_BT.shape[1]
        sizes = new_rows(spec, T)
        e_BTC = gpt.embed(params, ids_BT, self.dtype)
        before_BTC = jnp.concatenate([cache.last_BC[:, None], e_BTC[:, :-1]], axis=1)
        x_BTC = gpt.smear(params, e_BTC, before_BTC)
        tables, blocks = self._new_gists(params, x_BTC, count_B, cache, sizes)
        x_BRC = jnp.concatenate(tables, axis=1)
        first = [start_B[:, None] // spec.block**level for level in range(spec.levels + 1)]
        index = [f + jnp.arange(n) for f, n in zip(first, sizes, strict=True)]
        mu_BR, fraction_R = row_centres(cfg, index)
        sigma_R = jnp.concatenate([jnp.full(n, row_spread(cfg, level)) for level, n in enumerate(sizes)])
        rope = gaussian_rope(cfg, mu_BR, jnp.broadcast_to(sigma_R, mu_BR.shape), self.dtype, fraction_R)
        ids_BR = jnp.pad(ids_BT, ((0, 0), (0, sum(sizes[1:]))))
        raw_R1 = (jnp.arange(sum(sizes)) < T)[:, None].astype(self.dtype)
        x0_BRC, kept_BRC, layers = x_BRC, None, []
        for i, layer, _, value in decode.layer_weights(params, cfg, ids_BR, self.dtype):
            if value is not None:
                value["rows"] = value["rows"] * raw_R1
            x_BRC = gpt.enter_block(layer, x_BRC, x0_BRC)
            rows = gpt.qkv(layer, cfg, x_BRC, rope, value, sum(sizes[1:]))
            q, k, v = (split_levels(x, sizes) for x in rows)
            attn, after = gist_extend(q, k, v, cache.layers[i], start_B, count_B, spec=spec)
            layers.append(after)
            x_BRC = gpt.close_block(layer, x_BRC, jnp.concatenate(attn, axis=1))
            kept_BRC = x_BRC if i == cfg.n_layer // 2 else kept_BRC
        last_B11 = (count_B - 1)[:, None, None]
        x_B1C, kept_B1C, e_B1C = (jnp.take_along_axis(x, last_B11, axis=1) for x in (x_BRC, kept_BRC, e_BTC))
        logits_BV = decode.head_logits(params, cfg, x_B1C, kept_B1C)
        return logits_BV, RowCache(tuple(layers), blocks, e_B1C[:, 0], start_B + count_B)

    def regions(self, tokens: int) -> list[Region]:
        spec, found = self.cfg.gist_spec, []
        for level, (first, stop) in reversed(list(enumerate(spec.key_ranges(0, tokens - 1)))):
            if stop > first:
                span = spec.block**level
                found.append(Region(level, first * span, stop * span, stop - first))
        return found

    def _new_gists(self, params, x_BTC, count_B, cache: RowCache, sizes):
        """Per level the rows [B, n_l, C] that new tokens bring, from their first; and the blocks that are filling now.

        The children of a gist are new too, or stand in the block that was filling.
        """
        r, start_B = self.cfg.gist_block, cache.length_B
        tables = [x_BTC]
        blocks = []
        for level, old_BrC in enumerate(cache.blocks):
            below_BnC, span = tables[-1], r**level
            first_B, stop_B = start_B // span, (start_B + count_B) // span

            def pick(index_BI, below_BnC=below_BnC, old_BrC=old_BrC, first_B=first_B):
                """Rows of the level below by their index, new or old."""
                place_BI = index_BI - first_B[:, None]
                new = jnp.take_along_axis(below_BnC, jnp.maximum(place_BI, 0)[..., None], axis=1, mode="clip")
                old = jnp.take_along_axis(old_BrC, (index_BI % r)[..., None], axis=1)
                return jnp.where((place_BI >= 0)[..., None], new, old)

            newest_B1 = stop_B[:, None] - 1
            blocks.append(pick(newest_B1 - (newest_B1 - jnp.arange(r)) % r))
            n = sizes[level + 1]
            children_Bn = (start_B // (span * r))[:, None] * r + jnp.arange(n * r)
            full_NrC = pick(children_Bn).reshape(-1, r, below_BnC.shape[2])
            gist_NC = gistnet.encode(params["gistnet"], self.objective.gist, full_NrC)
            tables.append(gist_NC.reshape(-1, n, gist_NC.shape[1]))
        return tables, tuple(blocks)

    def decode_step(self, params, ids_B, cache: RowCache):
        cfg, r = self.cfg, self.cfg.gist_block
        position_B = cache.length_B
        e_BC = gpt.embed(params, ids_B, self.dtype)
        x_BC = gpt.smear(params, e_BC, cache.last_BC)
        x_B1C, kept_B1C, layers = self._row(
            params, x_BC[:, None], cache.layers, position_B, 0, ids_B[:, None]
        )
        logits_BV = decode.head_logits(params, cfg, x_B1C, kept_B1C)
        blocks = (_put(cache.blocks[0], x_BC, position_B % r, True), *cache.blocks[1:])
        # true of any number; the caches are then read before they change, and XLA has no reason to copy them
        read = x_B1C[0, 0, 0] < jnp.inf
        layers, blocks = self._gist_rows(params, position_B, 1, layers, blocks, read)
        return logits_BV, RowCache(layers, blocks, e_BC, position_B + 1)

    def _gist_rows(self, params, position_B, level: int, layers, blocks, go=True):
        """The gists of level `level` and above that are complete with this token; most tokens complete none."""
        if level > self.cfg.gist_levels:
            return layers, blocks
        ends_B = (position_B + 1) % self.cfg.gist_block**level == 0

        def complete(layers, blocks):
            layers, blocks = self._gist_row(params, position_B, ends_B, level, layers, blocks)
            return self._gist_rows(params, position_B, level + 1, layers, blocks)

        def once(todo):
            _, layers, blocks = todo
            return jnp.array(False), *complete(layers, blocks)

        # a loop of at most one round works on the caches in place; the branches of a `cond` would copy them
        return jax.lax.while_loop(lambda todo: todo[0], once, (ends_B.any() & go, layers, blocks))[1:]

    def _gist_row(self, params, position_B, ends_B, level: int, layers, blocks):
        """The gist of the block that ends with this token, through all layers, where one ends."""
        r, full_BrC = self.cfg.gist_block, blocks[level - 1]
        gist_BC = gistnet.encode(params["gistnet"], self.objective.gist, full_BrC)
        _, _, layers = self._row(params, gist_BC[:, None], layers, position_B, level, None, ends_B)
        if level < self.cfg.gist_levels:
            place_B = ((position_B + 1) // r**level - 1) % r
            blocks = (*blocks[:level], _put(blocks[level], gist_BC, place_B, ends_B), *blocks[level + 1 :])
        return layers, blocks

    def _row(self, params, x_B1C, layers, position_B, level: int, ids_B1, write_B=True):
        """One row per sequence, its span ending with token `position_B`: final stream, that of the middle, caches."""
        cfg, spec = self.cfg, self.cfg.gist_spec
        row_B = (position_B + 1) // spec.block**level - 1
        span = spec.block**level
        mu_B1, fraction = span_centres(row_B[:, None] * span, span)
        rope = gaussian_rope(cfg, mu_B1, jnp.full(mu_B1.shape, row_spread(cfg, level)), self.dtype, fraction)
        x0_B1C, kept_B1C, filled = x_B1C, None, []
        # a gist has no value embeddings: any token stands in, its rows are left out
        ids = jnp.zeros((len(position_B), 1), jnp.int32) if ids_B1 is None else ids_B1
        for i, layer, _, value in decode.layer_weights(params, cfg, ids, self.dtype):
            x_B1C = gpt.enter_block(layer, x_B1C, x0_B1C)
            q, k, v = gpt.qkv(layer, cfg, x_B1C, rope, *((value, 0) if level == 0 else (None, 1)))
            cache = append(layers[i], level, k[:, 0], v[:, 0], row_B, write_B)
            attn = gist_decode(
                q[:, 0],
                cache,
                position_B,
                spec=spec,
                level=level,
                implementation=self.objective.decode_implementation,
            )
            x_B1C = gpt.close_block(layer, x_B1C, attn[:, None])
            kept_B1C = x_B1C if i == cfg.n_layer // 2 else kept_B1C
            filled.append(cache)
        return x_B1C, kept_B1C, tuple(filled)


def gist_model(params: Any, objective: GistRows) -> Model:
    """A model with gist attention ready to generate; `params` is the training pytree."""
    alone = replace(objective, base=replace(objective.base, mesh=None))
    prepared = prepare_params(params, objective.base.dtype)
    if "reading" in params["gistnet"]:
        own = params["gistnet"]["reading"].astype(objective.base.dtype)
        prepared["h"] = tuple(layer | {"reading": w.T} for layer, w in zip(prepared["h"], own, strict=True))
    return Model(GistDecoder(alone), prepared | {"gistnet": gistnet.prepare(params["gistnet"])})


def _put(rows_BrC, x_BC, place_B, write_B):
    here_Br = (jnp.arange(rows_BrC.shape[1]) == place_B[:, None]) & jnp.broadcast_to(write_B, place_B.shape)[
        :, None
    ]
    return jnp.where(here_Br[..., None], x_BC[:, None].astype(rows_BrC.dtype), rows_BrC)
