"""What a model loses when its past is shown in a working context: the difference in nats over the next H tokens.

Held-out rows of T tokens: the first T - H are the history, shown raw, as a sliding window of equal budget, in gists
laid out by recency, and refocused by a lens; the last H are raw and predicted under each. Nothing that shapes a
context has seen what is predicted. Shape suffixes: R rows, T tokens, H horizon, W entries.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes
from megacontext_jax.context import setup
from megacontext_jax.context.allocator import AllocatorConfig, new_focus, refocus
from megacontext_jax.context.entries import pick
from megacontext_jax.context.focus import focus, seed_layout
from megacontext_jax.context.layout import Layout, append_raw, last_tokens, raw_layout
from megacontext_jax.context.lenses import LENSES, View
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.positions import entry_rope
from megacontext_jax.model import loss


@dataclass(frozen=True)
class Views:
    """How the history is shown, and how far ahead it is judged."""

    objective: ContextObjective
    allocator: AllocatorConfig
    budget: int
    horizon: int
    lenses: tuple[str, ...] = ("learned",)
    iterations: int = 2
    spare: float = 0.25  # share of the budget above the smallest context that is left to expansions

    def layouts(self, params, tables, ids_RT, key) -> dict:
        """{name: (layout of the history, statistics of the edits or None)}; ids are those of the history."""
        R, T = ids_RT.shape
        raw = raw_layout(R, T)
        shown = {
            "sliding": (Layout(*(x[:, max(0, T - self.budget) :] for x in raw)), None),
            "gist": (seed_layout(R, T, self.budget, self.allocator), None),
        }
        for lens in self.lenses:
            found = focus(
                self.objective,
                params,
                tables,
                ids_RT,
                self.allocator,
                budget=self.budget,
                lens=lens,
                iterations=self.iterations,
                spare=self.spare,
                key=key,
            )
            shown[lens] = found.layout, found.stats
        return shown

    def deltas(self, params, batch, key):
        """{view: nats per token [R] above the raw context, NaN in rows without a target}, and statistics by lens."""
        objective, H = self.objective, self.horizon
        ids_RT, targets_RT = batch["inputs"], batch["targets"]
        T = ids_RT.shape[1]
        history = T - H
        tables = objective.tables(params, ids_RT)
        raw_RH = objective.nll(params, batch)[:, history:]
        counted_RH = targets_RT[:, history:] >= 0
        count_R = counted_RH.sum(-1)
        found, stats = {}, {}
        for name, (layout, edits) in self.layouts(
            params, _up_to(tables, history, objective), ids_RT[:, :history], key
        ).items():
            whole = append_raw(layout, history, H)
            x_RWC = objective.hidden(params, tables, ids_RT, whole)
            labels_RW = pick(
                targets_RT, jnp.where(whole.valid_BW, last_tokens(whole, objective.context.block), 0)
            )
            nll_RW = objective.base.nats(loss.chunked_nll, params, x_RWC, labels_RW)
            ahead_RH = layout.count_B[:, None] + jnp.arange(H)
            delta_RH = jnp.where(counted_RH, jnp.take_along_axis(nll_RW, ahead_RH, axis=1) - raw_RH, 0.0)
            found[name] = jnp.where(count_R > 0, delta_RH.sum(-1) / jnp.maximum(count_R, 1), jnp.nan)
            if edits is not None:
                stats[name] = edits
        return found, stats


def _up_to(tables: tuple, tokens: int, objective) -> tuple:
    """The part of level tables that the first tokens make."""
    block = objective.context.block
    return tuple(table[:, : tokens // block**level] for level, table in enumerate(tables))


BASELINES = ("learned", "attention", "lexical", "random")


def views_of(config, objective: ContextObjective, lenses: tuple[str, ...] = ()) -> Views:
    """As the configuration uses the model; without `lenses` that of --mc-lens alone."""
    opts, T, ctx = config.mc, objective.cfg.sequence_len, objective.context
    return Views(
        objective,
        setup.allocator_config(opts, ctx, T),
        budget=setup.budget(opts, ctx, T, T - opts.mc_horizon),
        horizon=opts.mc_horizon,
        lenses=lenses or (opts.mc_lens,),
        iterations=setup.iterations(opts),
    )


class Probe:
    """Evaluates the working contexts of a model in training: metrics, and a line for people."""

    def __init__(
        self, views: Views, batches: Iterable[dict], mesh: Mesh, *, timers: bool = False, rows: int = 64
    ):
        self.views, self._batches, self._mesh, self._timers, self._rows = views, batches, mesh, timers, rows
        self._deltas = jax.jit(views.deltas, out_shardings=meshes.replicated(mesh))
        self._timed = None

    def __call__(self, params) -> dict[str, float]:
        deltas: dict[str, list] = {}
        stats: list = []
        seen = 0
        for batch in self._batches:
            placed = {name: meshes.global_batch(self._mesh, rows) for name, rows in batch.items()}
            found, edits = jax.device_get(self._deltas(params, placed, jax.random.key(seen)))
            for name, delta_R in found.items():
                deltas.setdefault(name, []).append(delta_R)
            stats.append(edits)
            seen += len(batch["inputs"])
            if seen >= self._rows:
                break
        return self._metrics({n: np.concatenate(d) for n, d in deltas.items()}, stats) | self._times(
            params, placed
        )

    def _metrics(self, deltas: dict, stats: list) -> dict[str, float]:
        views, out = self.views, {}
        name = f"val/delta_nll_h{views.horizon}"
        for view, delta_R in deltas.items():
            if np.isfinite(delta_R).any():
                out[f"{name}/{view}"] = float(np.nanmean(delta_R))
                out[f"{name}/{view}_p95"] = float(np.nanquantile(delta_R, 0.95))
        lens = views.lenses[0]
        for metric, field in (
            ("swap_rate", "swap_rate_B"),
            ("utilization", "utilization_B"),
            ("residency_mean", "residency_mean_B"),
            ("residency_p95", "residency_p95_B"),
        ):
            out[f"mc/{metric}"] = float(np.mean([np.mean(getattr(s[lens], field)) for s in stats]))
        return out

    def line(self, metrics: dict) -> str:
        """What the metrics say, for people."""
        prefix = f"val/delta_nll_h{self.views.horizon}/"
        deltas = {
            name.removeprefix(prefix): value
            for name, value in metrics.items()
            if name.startswith(prefix) and not name.endswith("_p95")
        }
        words = ", ".join(f"{view} {value:+.4f}" for view, value in deltas.items())
        return (
            f"nats above the raw context, {self.views.budget} entries: {words} | "
            f"swap rate {metrics['mc/swap_rate']:.3f}, budget used {metrics['mc/utilization']:.2f}"
        )

    def event(self, metrics: dict) -> dict:
        """Fields of the `focus_allocator` event."""
        return {
            "tag": "validation",
            "source": self.views.lenses[0],
            "wc_length": self.views.budget * metrics["mc/utilization"],
            **{
                name: metrics[f"mc/{name}"]
                for name in ("swap_rate", "utilization", "residency_mean", "residency_p95")
            },
        }

    def _times(self, params, batch) -> dict[str, float]:
        if not self._timers:
            return {}
        self._timed = self._timed or _stages(self.views)
        inputs = {"params": params, "batch": batch}
        times = {}
        for name, stage in self._timed.items():
            jax.block_until_ready(stage(inputs))  # compiles the first time
            started = time.perf_counter()
            inputs |= {name: jax.block_until_ready(stage(inputs))}
            times[f"mc/{name}_ms"] = 1e3 * (time.perf_counter() - started)
        return times


def _stages(views: Views) -> dict:
    """The parts of a refocus, each compiled by itself; each may use what those before it made."""
    objective, cfg = views.objective, views.allocator
    ctx = objective.context

    def layout_of(x):
        R, T = x["batch"]["inputs"].shape
        return seed_layout(R, T, views.budget, cfg)

    def lens(x):
        layout = layout_of(x)
        view = View(objective, x["params"], x["build"], x["batch"]["inputs"], layout, jax.random.key(0))
        return LENSES[views.lenses[0]](view)

    def allocate(x):
        T = x["batch"]["inputs"].shape[1]
        return refocus(new_focus(layout_of(x), cfg), x["lens_forward"], cfg, budget=views.budget, tokens=T)

    return {
        "build": jax.jit(lambda x: objective.tables(x["params"], x["batch"]["inputs"])),
        "positional": jax.jit(
            lambda x: entry_rope(objective.cfg, layout_of(x), ctx.block, ctx.positions, objective.base.dtype)
        ),
        "lens_forward": jax.jit(lens),
        "focus": jax.jit(allocate),
        "base_forward": jax.jit(
            lambda x: objective.hidden(x["params"], x["build"], x["batch"]["inputs"], layout_of(x))
        ),
    }
