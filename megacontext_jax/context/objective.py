"""Training with MegaContext: every sequence raw and in N compressed working contexts, in one compiled step.

Base model, GistNet and LensNet are trained together. The base model and GistNet learn from next-token
prediction alone, plus a small loss on forecasts of the next gist; LensNet learns which of two working contexts
of the same sequence predicts better. Shape suffixes: B sequences, T tokens, N working contexts per sequence, R =
B * N rows, W entries, L levels above the tokens, C width.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp

from megacontext_jax.context import forecast, gistnet, lens_loss, lensnet, metrics
from megacontext_jax.context.entries import layout_entries, pick
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.layout import compress, last_tokens, spans, starts
from megacontext_jax.context.lens_loss import LensLoss
from megacontext_jax.context.lensnet import LensConfig
from megacontext_jax.context.looks import QUERIES, attention_mass
from megacontext_jax.context.positions import alibi_bias
from megacontext_jax.context.tree import gather, gist_levels
from megacontext_jax.model import gpt, loss
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.attention import biased_attention
from megacontext_jax.model.objective import Objective


@dataclass(frozen=True)
class ContextConfig:
    """Shape of a model's MegaContext parts, as a checkpoint records it."""

    gist: GistConfig
    lens: LensConfig
    levels: int = 2
    positions: str = "gaussian"

    @property
    def block(self) -> int:
        return self.gist.block


@dataclass(frozen=True)
class Mixture:
    """How a step is made and weighted."""

    variants: int = 2
    recency_share: float = 0.0  # of the variants that are laid out by recency, as when the model is used
    recent: int = 128  # raw tokens at the end of every working context
    horizon: int = 32  # H of the reported difference in nats over the next H tokens
    ahead: int = 0  # newest tokens that LensNet does not see and is judged by; 0: it sees all, judged by all
    lens_weight: float = 0.1
    lens: LensLoss = field(default_factory=LensLoss)
    delta_weight: float = 0.0
    gist_token_weight: float = 0.0
    regression_weight: float = 0.02
    freeze_base: bool = False


@dataclass(frozen=True)
class ContextObjective:
    """The `Objective` of a model with MegaContext; `width` is the entries of a working context in this phase."""

    base: Objective
    context: ContextConfig
    mixture: Mixture
    width: int
    aux_dtype: jnp.dtype | None = None  # of GistNet's and LensNet's activations; None: the model's

    @property
    def cfg(self) -> GPTConfig:
        return self.base.cfg

    def init(self, key) -> dict:
        return self.base.init(key) | init_context(self.context, jax.random.fold_in(key, 1))

    def nll(self, params, batch):
        """Nats [B, T] of the raw sequences: what a vanilla model is judged by."""
        return self.base.nll(params, batch)

    @property
    def _aux(self):
        return self.aux_dtype or self.base.dtype

    def tables(self, params, ids_BT):
        """Level tables of a batch: embeddings, then gists."""
        ctx = self.context
        e_BTC = self.base.place(gpt.embed(params, ids_BT, self.base.dtype))
        return gist_levels(params, ctx.gist, ctx.levels, e_BTC, self._aux)

    @property
    def queries(self) -> int:
        """Newest raw tokens of which a lens may ask what they look for."""
        return max(1, min(QUERIES, self.mixture.recent - self.mixture.ahead))

    def look(self, params, tables, ids_BT, layout, hidden: int = 0):
        """Final normed activations [R, W, C] of working contexts, and the mass [R, W] of the newest entries' attention.

        The last `hidden` entries neither look nor are looked at.
        """
        mass_RW = attention_mass(layout, self.queries, hidden)
        return self.hidden(params, tables, ids_BT, layout, mass_RW)

    def hidden(self, params, tables, ids_BT, layout, watch=None):
        """Final normed activations [R, W, C] of working contexts; with `watch` as in `gpt.run_trunk`."""
        ctx, attention = self.context, None
        entries = layout_entries(
            params, self.cfg, tables, ids_BT, layout, block=ctx.block, positions=ctx.positions
        )
        if ctx.positions == "gaussian_alibi":
            attention = partial(biased_attention, alibi_bias(layout, ctx.block, self.cfg.n_head))
        return self.base.trunk(
            params, entries._replace(x_BTC=self.base.place(entries.x_BTC)), attention, watch
        )

    def scores(self, params, tables, layout, mass_RW, hidden: int = 0):
        """LensNet's scores [R, W], the last `hidden` entries unseen; it looks and does not bend what it looks at.

        `mass_RW` is the attention of the newest entries (`look`).
        """
        if hidden:
            seen_W = jnp.arange(layout.valid_BW.shape[1]) < layout.valid_BW.shape[1] - hidden
            layout = layout._replace(valid_BW=layout.valid_BW & seen_W)
        return self.entry_scores(params, jax.lax.stop_gradient(gather(tables, layout)), layout, mass_RW)

    def entry_scores(self, params, x_RWC, layout, mass_RW):
        """LensNet's scores [R, W] of a layout whose entries hold the rows `x_RWC` of the level tables.

        Without `mass_RW` it judges by what they hold alone.
        """
        ctx = self.context
        return lensnet.lens_scores(
            params["lensnet"],
            ctx.lens,
            x_RWC.astype(self._aux),
            layout,
            _lens_positions(ctx.positions),
            mass_RW,
            longest=self.cfg.sequence_len,
        )

    def loss(self, params, batch, key):
        """(summed loss, (weight, statistics)): the loss of a token times the number of targets."""
        mix, ctx = self.mixture, self.context
        if mix.freeze_base:
            params = {
                name: x if name in ("gistnet", "lensnet") else jax.lax.stop_gradient(x)
                for name, x in params.items()
            }
        ids_BT, targets_BT = batch["inputs"], batch["targets"]
        B, T = ids_BT.shape
        N, W = mix.variants, self.width

        # the sequence as it is
        x_BTC = self.base.hidden(params, ids_BT)
        valid_BT = (targets_BT >= 0).astype(jnp.float32)
        raw_sum, raw_BT = self.base.nats(loss.weighted_nll, params, x_BTC, targets_BT, valid_BT)
        weight = valid_BT.sum()
        raw_loss = raw_sum / jnp.maximum(weight, 1.0)
        if N == 0:
            return raw_sum, (weight, {})

        # the same sequences in working contexts
        with jax.named_scope("controller"):
            by_recency_R = jax.random.uniform(jax.random.fold_in(key, 2), (B * N,)) < mix.recency_share
            cut = compress(
                jax.random.fold_in(key, 0),
                B * N,
                T,
                W,
                block=ctx.block,
                levels=ctx.levels,
                recent=mix.recent,
                oldest_first=by_recency_R,
            )
            layout = cut.layout
            last_RW = last_tokens(layout, ctx.block)
            labels_RW = pick(targets_BT, last_RW)
            counted_RW = ((layout.level_BW == 0) & (labels_RW >= 0)).astype(jnp.float32)
            soft_RW = ((layout.level_BW > 0) & (labels_RW >= 0)) * mix.gist_token_weight
            base_RW = pick(raw_BT, last_RW)
        tables = self.tables(params, ids_BT)
        x_RWC, mass_RW = self.look(params, tables, ids_BT, layout, mix.ahead)
        weights_RW = counted_RW + soft_RW
        if mix.delta_weight:  # contexts worse than the raw one count more
            seen_RW = self.base.nats(loss.chunked_nll, params, jax.lax.stop_gradient(x_RWC), labels_RW)
            worse_R = (counted_RW * (seen_RW - base_RW)).sum(-1) > 0
            weights_RW = weights_RW * (1 + mix.delta_weight * worse_R)[:, None]
        sum_R, nll_RW = self.base.nats(loss.weighted_nll, params, x_RWC, labels_RW, weights_RW)
        variant_loss = sum_R / jnp.maximum((counted_RW + soft_RW).sum(), 1.0)
        total = (raw_loss + N * variant_loss) / (1 + N)

        with jax.named_scope("controller"):
            delta_RW = (nll_RW - base_RW) * counted_RW
            stats = metrics.collect(
                nll_RW.reshape(B, N, W),
                delta_RW.reshape(B, N, W),
                counted_RW.reshape(B, N, W),
                layout.level_BW.reshape(B, N, W),
                ctx.levels,
                mix.horizon,
            )
            judged_RW = counted_RW * (jnp.arange(W) >= (W - mix.ahead if mix.ahead else 0))
            judged_BN = judged_RW.sum(-1).reshape(B, N)
            gain_BN = (delta_RW * judged_RW).sum(-1).reshape(B, N) / jnp.maximum(judged_BN, 1.0)
            stats |= {"raw_nats": raw_sum, "raw_weight": weight}
        if mix.regression_weight:
            regression, forecasts = self._regression(
                params, tables, layout, x_RWC, jax.random.fold_in(key, 1)
            )
            total += mix.regression_weight * regression
            stats |= {"regression": regression, "forecasts": forecasts}
        if mix.lens_weight and N > 1:
            lens, lens_stats = self.lens(params, tables, cut, mass_RW, gain_BN, judged_BN > 0)
            total += mix.lens_weight * lens
            stats |= lens_stats
        return weight * total, (weight, jax.lax.stop_gradient(stats))

    def _regression(self, params, tables, layout, x_RWC, key):
        """(loss of forecasts of the next gist, from a sample of the gist entries; the same by level)."""
        cfg = self.cfg
        R, W = layout.level_BW.shape
        nodes_L = jnp.asarray([table.shape[1] for table in tables])
        level_RW, next_RW = layout.level_BW, layout.node_BW + 1
        known_RW = (level_RW > 0) & (next_RW < nodes_L[level_RW])
        order_RW = jnp.where(known_RW, jax.random.uniform(key, (R, W)), -1.0)
        _, at_RP = jax.lax.top_k(order_RW, max(1, W // 16))
        known_RP = jnp.take_along_axis(known_RW, at_RP, axis=1)
        level_RP = jnp.take_along_axis(level_RW, at_RP, axis=1)
        node_RP = jnp.where(known_RP, jnp.take_along_axis(next_RW, at_RP, axis=1), 0)
        target_RPC = gather(tables, layout._replace(level_BW=level_RP, node_BW=node_RP))
        h_RPC = jnp.take_along_axis(x_RWC, at_RP[..., None], axis=1)
        loss_RP = forecast.forecast_loss(params, cfg, h_RPC, target_RPC)
        weight_RP = known_RP * forecast.level_weight(level_RP)
        total = (weight_RP * loss_RP).sum() / jnp.maximum(weight_RP.sum(), 1.0)
        return total, metrics.forecast_statistics(loss_RP, level_RP, known_RP, self.context.levels)

    def lens(self, params, tables, cut, mass_RW, delta_BN, usable_BN):
        """(LensNet's loss, statistics) of N working contexts of each sequence; see `preference`."""
        score_RW = self.scores(params, tables, cut.layout, mass_RW, self.mixture.ahead)
        return self.preference(cut, score_RW, delta_BN, usable_BN)

    def preference(self, cut, score_RW, delta_BN, usable_BN):
        """(loss, statistics) of scores, given what each working context lost `delta_BN` where it is usable."""
        mix, ctx = self.mixture, self.context
        layout = cut.layout
        B, N = delta_BN.shape
        W = layout.level_BW.shape[1]
        score_BNW = score_RW.reshape(B, N, W)
        level_BNW = layout.level_BW.reshape(B, N, W)
        with jax.named_scope("controller"):
            pairs = lens_loss.choose_pairs(
                delta_BN, usable_BN, mix.lens.max_pairs, mix.lens.hard_negative_ratio
            )
            # advantages in units of their spread over the step, so that a lens learns from small differences too
            spread = jnp.sqrt(_mean(jnp.square(pairs.delta_BNN), pairs.used_BNN) + 1e-12)
            advantage_BNN = jnp.where(pairs.used_BNN, jnp.tanh(pairs.delta_BNN / spread), 0.0)
            # level at which context m shows the place where an entry of context n begins
            shown_BNG = cut.block_level_BN.reshape(B, N, -1)
            block_BNW = starts(layout, ctx.block).reshape(B, N, W) // ctx.block
            G = shown_BNG.shape[-1]
            inside_BNW = jnp.minimum(block_BNW, G - 1).reshape(B, 1, N * W)
            shown_BMP = jnp.take_along_axis(shown_BNG, jnp.broadcast_to(inside_BNW, (B, N, N * W)), axis=2)
            shown_BNMW = shown_BMP.reshape(B, N, N, W).swapaxes(1, 2)  # [B, n, m, W]
            shown_BNMW = jnp.where(block_BNW[:, :, None] < G, shown_BNMW, 0)
            targets = lens_loss.entry_targets(
                level_BNW[:, :, None], shown_BNMW, advantage_BNN[..., None], ctx.levels
            )
            score_BNMW = jnp.broadcast_to(score_BNW[:, :, None], targets.shape)
            span_BNMW = jnp.broadcast_to(
                spans(level_BNW, ctx.block)[:, :, None].astype(jnp.float32), targets.shape
            )
            losses, imbalance, agreement, supervised = lens_loss.pair_losses(
                mix.lens,
                score_BNMW.reshape(-1, W),
                targets.reshape(-1, W),
                span_BNMW.reshape(-1, W),
                (pairs.delta_BNN / spread).reshape(-1),
            )
            total = lens_loss.lens_loss(mix.lens, losses, imbalance, supervised)
            stats = metrics.lens_statistics(total, score_BNW, score_BNMW, targets, agreement, supervised)
        return total, stats

    def summarise(self, stats) -> dict:
        """Metrics of a step from the statistics of its micro-batches."""
        if not stats:
            return {}
        T = self.cfg.sequence_len
        return metrics.summarise(
            stats, levels=self.context.levels, horizon=self.mixture.horizon, ratio=T / self.width
        )

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token of the sequence, of all three networks."""
        cfg, ctx, mix = self.cfg, self.context, self.mixture
        T, W, N = cfg.sequence_len, self.width, mix.variants
        vanilla = cfg.flops_per_token()
        if N == 0:
            return vanilla
        shorter = replace(cfg, sequence_len=W).flops_per_token()  # attention over W entries
        blocks = sum(T // ctx.block**level for level in range(1, ctx.levels + 1))
        gist = ctx.gist.flops_per_block() * blocks / T
        lens = ctx.lens.flops_per_entry(W) * N * W / T if mix.lens_weight and N > 1 else 0.0
        return vanilla + N * shorter * W / T + gist + lens


def init_context(ctx: ContextConfig, key) -> dict:
    """Fresh GistNet and LensNet."""
    gist_key, lens_key = jax.random.split(key)
    return {
        "gistnet": gistnet.init_gistnet(ctx.gist, gist_key),
        "lensnet": lensnet.init_lensnet(ctx.lens, lens_key),
    }


def _lens_positions(kind: str) -> str:
    return "gaussian" if kind == "gaussian_alibi" else kind


def _mean(x, mask):
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)
