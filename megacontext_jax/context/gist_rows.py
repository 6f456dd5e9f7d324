"""A model with gist attention: rows of gists travel beside the tokens through every layer.

Row j of level l stands for tokens [j r^l, (j + 1) r^l) and enters as GistNet of the rows below it; layers, head and
norms are the model's own. Who sees whom is `GistSpec`. Shape suffixes: B sequences, T tokens, R rows of all levels
(the tokens first, then level 1, ...), C width, H heads, K key heads, D head size, P forecasts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import GistSpec, gist_attention
from megacontext_jax import mesh as meshes
from megacontext_jax.context import forecast, gistnet
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.positions import gaussian_rope, span_centres
from megacontext_jax.context.tree import build_levels
from megacontext_jax.model import gpt, loss
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective


@dataclass(frozen=True)
class GistRows:
    """The `Objective` of a model with gist attention."""

    base: Objective
    gist: GistConfig
    regression_weight: float = 0.02  # of forecasts of the next gist
    implementation: str | None = None  # of gist attention
    longest_gap: int = 0  # in training, see `gaps`; 0: none
    decode_implementation: str = "xla"  # of one row at a time, see `gist_decode`

    @property
    def cfg(self) -> GPTConfig:
        return self.base.cfg

    def init(self, key) -> dict:
        gist_params = gistnet.init_gistnet(self.gist, jax.random.fold_in(key, 1))
        return self.base.init(key) | {"gistnet": gist_params}

    def rows(self, params, ids_BT) -> tuple[jax.Array, ...]:
        """Level tables of a batch: tokens as they enter the transformer, then gists.

        Smeared over the ends of blocks too: what a block's end parts is still found together in the gist behind it.
        """
        e_BTC = self.base.place(gpt.embed(params, ids_BT, self.base.dtype))
        x_BTC = gpt.smear(params, e_BTC, gpt.shift_right(e_BTC))
        encode = partial(gistnet.encode, params["gistnet"], self.gist)
        tables = build_levels(encode, x_BTC, self.gist.block, self.cfg.gist_levels)
        empty_B0C = x_BTC[:, :0]
        return tables + (empty_B0C,) * (self.cfg.gist_levels + 1 - len(tables))

    def hidden(self, params, ids_BT, tables=None, gap_BR=None):
        """Final normed activations per level, [B, T // r^l, C] each; `gap_BR` as in `gaps`."""
        tables = self.rows(params, ids_BT) if tables is None else tables
        sizes = self.cfg.gist_spec.rows(ids_BT.shape[1])
        entries = row_entries(params, self.cfg, tables, ids_BT, gap_BR)
        attention = row_attention(self.cfg.gist_spec, sizes, self.implementation, self.base.mesh)
        x_BRC = self.base.trunk(params, entries._replace(x_BTC=self.base.place(entries.x_BTC)), attention)
        return split_levels(x_BRC, sizes)

    def nll(self, params, batch):
        """Nats [B, T] under gist attention, 0 at ignored targets."""
        x_BTC = self.hidden(params, batch["inputs"])[0]
        return self.base.nats(loss.chunked_nll, params, x_BTC, batch["targets"])

    def loss(self, params, batch, key):
        """(summed loss, (weight, statistics)) as in `Objective`."""
        targets_BT = batch["targets"]
        tables = self.rows(params, batch["inputs"])
        gap_BR = gaps(self.cfg, *targets_BT.shape, self.longest_gap, jax.random.fold_in(key, 1))
        hidden = self.hidden(params, batch["inputs"], tables, gap_BR)
        weight = (targets_BT >= 0).sum().astype(jnp.float32)
        nats = self.base.nats(loss.nll_sum, params, hidden[0], targets_BT)
        if not self.regression_weight or all(x.shape[1] < 2 for x in hidden[1:]):
            return nats, (weight, self._statistics())
        regression, stats = self._regression(params, tables, hidden, key)
        return nats + weight * self.regression_weight * regression, (weight, stats)

    def _regression(self, params, tables, hidden, key):
        """Loss of the forecasts of a sample of the rows, about one per 32 tokens, and statistics."""
        ahead = [slice(0, max(0, x.shape[1] - 1)) for x in hidden]
        h_BRC = jnp.concatenate([x[:, now] for x, now in zip(hidden[1:], ahead[1:], strict=True)], axis=1)
        next_BRC = jnp.concatenate([x[:, 1:] for x in tables[1:]], axis=1)
        level_R = np.concatenate([np.full(x.stop, level) for level, x in enumerate(ahead)][1:])
        B, R = h_BRC.shape[:2]
        count = max(1, min(R, tables[0].shape[1] // 32))
        _, at_BP = jax.lax.top_k(jax.random.uniform(jax.random.fold_in(key, 0), (B, R)), count)
        h_BPC, next_BPC = (jnp.take_along_axis(x, at_BP[..., None], axis=1) for x in (h_BRC, next_BRC))
        loss_BP = forecast.forecast_loss(params, self.cfg, h_BPC, next_BPC)
        level_BP = jnp.asarray(level_R)[at_BP]
        weight_BP = forecast.level_weight(level_BP)
        stats = self._statistics()
        for level in range(1, self.cfg.gist_levels + 1):
            here_BP = level_BP == level
            stats[f"level_{level}"] = jnp.stack([(loss_BP * here_BP).sum(), here_BP.sum()])
        return (weight_BP * loss_BP).sum() / weight_BP.sum(), jax.lax.stop_gradient(stats)

    def _statistics(self) -> dict:
        """Per level: sum of the forecasts' losses, and how many."""
        return {f"level_{level}": jnp.zeros(2) for level in range(1, self.cfg.gist_levels + 1)}

    def summarise(self, stats) -> dict:
        """Metrics of a step from the statistics of its micro-batches; NaN where it made no forecast."""
        sums = {name: pair.sum(0) for name, pair in stats.items()}
        total = sum(sums.values())
        found = {"mc/gist_regression_loss": total} | {
            f"mc/gist_regression_loss/{name}": pair for name, pair in sums.items()
        }
        return {
            name: jnp.where(pair[1] > 0, pair[0] / jnp.maximum(pair[1], 1.0), jnp.nan)
            for name, pair in found.items()
        }

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token of the sequence: all rows, what each sees, GistNet, forecasts."""
        cfg, spec = self.cfg, self.cfg.gist_spec
        T = cfg.sequence_len
        dense = cfg.flops_per_token()
        rows = [n / T for n in spec.rows(T)]
        pairs = sum(
            int(sum(stop - start for start, stop in spec.key_ranges(level, np.arange(n))).sum())
            for level, n in enumerate(spec.rows(T))
        )
        attention = 12 * cfg.n_layer * cfg.n_embd * pairs / T
        layers = 6 * cfg.num_params()["transformer"]
        head = dense - layers - 12 * cfg.n_layer * cfg.n_embd * T
        gists = self.gist.flops_per_block() * sum(rows[1:])
        weights = 2 * cfg.num_params()["lm_head"] if self.gist.forecast == "expected" else cfg.n_embd**2
        forecasts = 6 * weights / 32 if self.regression_weight else 0.0
        return layers * sum(rows) + head + attention + gists + forecasts


def gaps(cfg: GPTConfig, batch: int, tokens: int, longest: int, key):
    """int32 [B, R], added to the places of rows: a random gap, up to `longest` tokens, at a boundary of the top level.

    So that far gists are seen in training at every distance that they have in use. Lengths are uniform in their logarithm. None
    without a boundary or a gap.
    """
    span = cfg.gist_block**cfg.gist_levels
    if not longest or tokens <= span:
        return None
    where, length = jax.random.split(key)
    boundary_B1 = span * jax.random.randint(where, (batch, 1), 1, (tokens - 1) // span + 1)
    gap_B1 = jnp.exp(jax.random.uniform(length, (batch, 1), maxval=np.log(longest))).astype(jnp.int32)
    return gap_at(cfg, tokens, boundary_B1, gap_B1)


def gap_at(cfg: GPTConfig, tokens: int, boundary_B1, gap_B1):
    """int32 [B, R]: the gap, for rows of all levels that begin at the boundary or behind it."""
    spec = cfg.gist_spec
    start_R = np.concatenate([np.arange(n) * spec.block**level for level, n in enumerate(spec.rows(tokens))])
    return jnp.where(start_R >= boundary_B1, gap_B1, 0)


def row_entries(params, cfg: GPTConfig, tables: tuple, ids_BT, gap_BR=None) -> gpt.Entries:
    """What enters the transformer: tokens as ever, then the gists of each level. Gists have no value embeddings."""
    x_BRC = jnp.concatenate(tables, axis=1)
    values = gpt.value_params(params, ids_BT, x_BRC.dtype)
    if values:
        more = x_BRC.shape[1] - ids_BT.shape[1]
        values["rows"] = jnp.pad(values["rows"], ((0, 0), (0, 0), (0, more), (0, 0)))
    rope = row_rope(cfg, [x.shape[1] for x in tables], x_BRC.dtype, gap_BR)
    return gpt.Entries(x_BRC, rope, values, x_BRC.shape[1] - ids_BT.shape[1])


def row_rope(cfg: GPTConfig, sizes, dtype, gap_BR=None):
    """cos and sin [R, D/2] of rows 0, 1, ... of every level, those of tokens are the dense model's; or [B, R, D/2] with gaps."""
    index_R = [np.arange(n) for n in sizes]
    mu_R, fraction_R = row_centres(cfg, index_R)
    sigma_R = np.concatenate([np.full(n, row_spread(cfg, level)) for level, n in enumerate(sizes)])
    mu = mu_R if gap_BR is None else mu_R + gap_BR
    return gaussian_rope(cfg, mu, jnp.asarray(sigma_R, jnp.float32), dtype, fraction_R)


def row_centres(cfg: GPTConfig, index):
    """The middles of the spans of rows `index[level]` [..., n_l] of all levels, in tokens: (whole [..., R], what is left [R])."""
    whole, left = [], []
    for level, rows in enumerate(index):
        span = cfg.gist_block**level
        middle, fraction = span_centres(rows * span, span)
        whole.append(middle)
        left.append(np.full(rows.shape[-1], fraction, np.float32))
    return jnp.concatenate(whole, axis=-1), np.concatenate(left)


def row_spread(cfg: GPTConfig, level: int) -> float:
    """Length of the span by which its phases are damped; none for tokens."""
    return float(cfg.gist_block**level) if level and cfg.gist_positions == "gaussian" else 0.0


def split_levels(x_BRC, sizes) -> tuple[jax.Array, ...]:
    ends = np.cumsum(sizes)
    return tuple(x_BRC[:, end - n : end] for n, end in zip(sizes, ends, strict=True))


def row_attention(spec: GistSpec, sizes, implementation: str | None, mesh: Mesh | None = None) -> Callable:
    """Gist attention as a layer calls it, over the rows of all levels side by side.

    On a mesh every device attends for its own sequences and heads.
    """

    def attend(q_BRHD, k_BRKD, v_BRKD):
        levels = (split_levels(x, sizes) for x in (q_BRHD, k_BRKD, v_BRKD))
        return jnp.concatenate(gist_attention(*levels, spec=spec, implementation=implementation), axis=1)

    def attention(q_BRHD, k_BRKD, v_BRKD, *, window: int | None = None):
        del window  # the pattern of every layer is `spec`
        if mesh is None or mesh.size == 1:
            return attend(q_BRHD, k_BRKD, v_BRKD)
        heads = "tensor" if k_BRKD.shape[2] % mesh.shape["tensor"] == 0 else None
        part = P(meshes.BATCH, None, heads, None)
        # kernels and loops inside do not say along which axes their results vary
        split = jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part, check_vma=False)
        return split(q_BRHD, k_BRKD, v_BRKD)

    return attention
