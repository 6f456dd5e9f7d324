"""What a model loses when its past is shown in a working context: the difference in nats over the next H tokens.

Held-out rows of T tokens: the first T - H are the history, shown raw, as a sliding window of equal budget, in gists
laid out by recency, and refocused by a lens; the last H are raw and predicted under each. Nothing that shapes a
context has seen what is predicted. Shape suffixes: R rows, T tokens, H horizon, W entries.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes
from megacontext_jax.context import setup
from megacontext_jax.context.allocator import AllocatorConfig, new_focus, refocus
from megacontext_jax.context.focus import focus, seed_layout
from megacontext_jax.context.layout import Layout, append_raw, compress, raw_layout, starts
from megacontext_jax.context.lenses import LENSES, View
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.context.positions import entry_rope
from megacontext_jax.eval.strips import ascii_strip, token_levels
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

    def layouts(self, params, tables, ids_RT, key) -> dict:
        """{name: (layout of the history, statistics of the edits or None)}; ids are those of the history."""
        R, T = ids_RT.shape
        raw = raw_layout(R, T)
        shown = {
            "sliding": (Layout(*(x[:, max(0, T - self.budget) :] for x in raw)), None),
            "gist": (seed_layout(R, T, self.budget, self.allocator), None),
        }
        for lens in self.lenses:
            found = self._focus(params, tables, ids_RT, lens, key)
            shown[lens] = found.layout, found.stats
        return shown

    def _focus(self, params, tables, ids_RT, lens: str, key):
        return focus(
            self.objective,
            params,
            tables,
            ids_RT,
            self.allocator,
            budget=self.budget,
            lens=lens,
            iterations=self.iterations,
            key=key,
        )

    def deltas(self, params, batch, key):
        """{view: nats per token [R] above the raw context, NaN in rows without a target}, and statistics by lens."""
        objective, H = self.objective, self.horizon
        targets_RH = batch["targets"][:, -H:]
        raw_RH = objective.nll(params, batch)[:, -H:]
        counted_RH = targets_RH >= 0
        count_R = counted_RH.sum(-1)
        found, stats = {}, {}
        for name, x_RHC, edits in self.ahead(params, batch["inputs"], key):
            nll_RH = objective.base.nats(loss.chunked_nll, params, x_RHC, targets_RH)
            delta_RH = jnp.where(counted_RH, nll_RH - raw_RH, 0.0)
            found[name] = jnp.where(count_R > 0, delta_RH.sum(-1) / jnp.maximum(count_R, 1), jnp.nan)
            if edits is not None:
                stats[name] = edits
        return found, stats

    def ahead(self, params, ids_RT, key) -> Iterator[tuple]:
        """Per view its name, the final activations [R, H, C] of the last H tokens under it, and statistics of the edits."""
        objective, H = self.objective, self.horizon
        history = ids_RT.shape[1] - H
        tables = objective.tables(params, ids_RT)
        past = _up_to(tables, history, objective)
        for name, (layout, edits) in self.layouts(params, past, ids_RT[:, :history], key).items():
            x_RWC = objective.hidden(params, tables, ids_RT, append_raw(layout, history, H))
            ahead_RH = layout.count_B[:, None] + jnp.arange(H)
            yield name, jnp.take_along_axis(x_RWC, ahead_RH[..., None], axis=1), edits

    def look(self, params, ids_RT, key) -> "Seen":
        """The context of the first row before and after the first lens."""
        ids_RT = ids_RT[:1, : ids_RT.shape[1] - self.horizon]
        tables = self.objective.tables(params, ids_RT)
        lens = self.lenses[0]
        found = self._focus(params, tables, ids_RT, lens, key)
        score_RW = LENSES[lens](View(self.objective, params, tables, ids_RT, found.before, key))
        return Seen(found.before, found.layout, score_RW)


def _up_to(tables: tuple, tokens: int, objective) -> tuple:
    """The part of level tables that the first tokens make."""
    block = objective.context.block
    return tuple(table[:, : tokens // block**level] for level, table in enumerate(tables))


class Seen(NamedTuple):
    before: Layout
    after: Layout
    score_RW: jax.Array  # of the entries before


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


class Detail(NamedTuple):
    """What is told beside the metrics."""

    timers: bool = False
    report: bool = True  # the line for people
    strip: bool = False  # a focused context as characters
    scores: bool = False  # the scores behind it
    training_strip: bool = False  # a working context as training draws them


METRICS_ALONE = Detail()


class Probe:
    """Evaluates the working contexts of a model in training: metrics, lines for people, events for dashboards."""

    def __init__(
        self,
        views: Views,
        batches: Iterable[dict],
        mesh: Mesh,
        *,
        detail: Detail = METRICS_ALONE,
        rows: int = 64,
    ):
        self.views, self.detail = views, detail
        self._batches, self._mesh, self._rows = batches, mesh, rows
        self._deltas = jax.jit(views.deltas, out_shardings=meshes.replicated(mesh))
        self._look = jax.jit(views.look, out_shardings=meshes.replicated(mesh))
        self._timed = None
        self._seen: Seen | None = None

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
        if self.detail.strip or self.detail.scores or self.detail.timers:
            self._seen = jax.device_get(self._look(params, placed["inputs"], jax.random.key(0)))
        metrics = self._metrics({n: np.concatenate(d) for n, d in deltas.items()}, stats)
        return metrics | self._times(params, placed)

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
        return out | self._counts([s[lens] for s in stats])

    def _counts(self, stats: list) -> dict[str, float]:
        """What was shown and refocused, added up."""
        views = self.views

        def total(per_row) -> float:
            return float(sum(np.sum(per_row(s)) for s in stats))

        rows, T = total(lambda s: np.ones_like(s.expands_B)), views.objective.cfg.sequence_len
        return {
            "mc/runtime_tokens": rows * T,
            "mc/runtime_original_tokens": rows * (T - views.horizon),
            "mc/runtime_wc_tokens": total(lambda s: np.round(s.utilization_B * views.budget)),
            "mc/runtime_refocus_updates": rows * views.iterations,
            "mc/runtime_refocus_replacements": total(lambda s: s.expands_B + s.collapses_B),
        }

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

    def lines(self, metrics: dict) -> list[str]:
        """All that the configuration asks to print."""
        lines = [self.line(metrics)] if self.detail.report else []
        seen, cfg = self._seen, self.views.allocator
        tokens = self.views.objective.cfg.sequence_len - self.views.horizon
        if seen and self.detail.strip:
            for name, layout in (("before focus", seen.before), ("after", seen.after)):
                strip = ascii_strip(token_levels(layout, cfg.block, tokens)[0], cfg.block, cfg.recent)
                lines.append(f"{name:>12} {strip}")
        if seen and self.detail.scores:
            level, node, valid = (x[0] for x in seen.before)
            told = [
                f"{k}:{i} {s:+.2f}"
                for k, i, s, v in zip(level, node, seen.score_RW[0], valid, strict=True)
                if v and k
            ]
            lines.append(f"scores of gists (level:node): {', '.join(told)}")
        return lines

    def training_line(self, objective: ContextObjective, step: int) -> str | None:
        """A working context as the step draws them."""
        mix, ctx = objective.mixture, objective.context
        if not (self.detail.training_strip and mix.variants):
            return None
        T = objective.cfg.sequence_len
        options = {"block": ctx.block, "levels": ctx.levels, "recent": mix.recent}
        layout = compress(jax.random.key(step), 1, T, objective.width, **options).layout
        strip = ascii_strip(token_levels(layout, ctx.block, T)[0], ctx.block, mix.recent)
        return f"in training {strip}"

    def events(self, metrics: dict) -> list[tuple[str, dict]]:
        """(name, fields) of the events that describe a validation (telemetry/names.py)."""
        views, seen = self.views, self._seen
        delta = f"val/delta_nll_h{views.horizon}/{views.lenses[0]}"
        allocator = {
            "tag": "validation",
            "source": views.lenses[0],
            "wc_length": views.budget * metrics["mc/utilization"],
            **{
                name: metrics[f"mc/{name}"]
                for name in ("swap_rate", "utilization", "residency_mean", "residency_p95")
            },
        }
        found = [("focus_allocator", allocator)]
        if delta in metrics:
            fields = {"mean": metrics[delta], "p95": metrics[f"{delta}_p95"], "horizon": views.horizon}
            found.append(("delta_nll", fields))
        if seen:
            score = seen.score_RW[seen.before.valid_BW]
            allocator |= {f"score_{name}": getattr(score, name)() for name in ("mean", "std", "max", "min")}
            found += [
                ("mc_tree_snapshot", self._tree()),
                ("working_context_snapshot", self._context(seen.after)),
            ]
        return found

    def _tree(self) -> dict:
        objective = self.views.objective
        tokens = objective.cfg.sequence_len - self.views.horizon
        ctx, C = objective.context, objective.cfg.n_embd
        summary = {level: [tokens // ctx.block**level, C] for level in range(ctx.levels + 1)}
        return {"tag": "validation", "summary": summary, "total_tokens": tokens, "max_lod": ctx.levels}

    def _context(self, layout: Layout) -> dict:
        valid = layout.valid_BW[0]
        return {
            "tag": "validation",
            "length": int(valid.sum()),
            "lods": layout.level_BW[0][valid],
            "positions": np.asarray(starts(layout, self.views.allocator.block))[0][valid],
        }

    def _times(self, params, batch) -> dict[str, float]:
        if not self.detail.timers:
            return {}
        self._timed = self._timed or _stages(self.views)
        layout = seed_layout(*batch["inputs"].shape, self.views.budget, self.views.allocator)
        layout = jax.device_put(jax.device_get(layout), meshes.replicated(self._mesh))
        inputs = {"params": params, "batch": batch, "layout": layout, "key": jax.random.key(0)}
        times = {}
        for name, stage in self._timed.items():
            jax.block_until_ready(stage(inputs))  # compiles the first time
            started = time.perf_counter()
            inputs |= {name: jax.block_until_ready(stage(inputs))}
            times[f"mc/{name}_ms"] = 1e3 * (time.perf_counter() - started)
        controller = ("build", "variant", "positional", "lens_forward")
        times["mc/time_controller_ms"] = sum(times.get(f"mc/{name}_ms", 0.0) for name in controller)
        return times


def _stages(views: Views) -> dict:
    """The parts of a refocus and of a step, each compiled by itself; each may use what those before it made.

    Layouts come in from outside: what follows from constants alone would be computed by the compiler, in no time.
    """
    objective, cfg = views.objective, views.allocator
    ctx, mix = objective.context, objective.mixture

    def look(x):
        return objective.look(x["params"], x["build"], x["batch"]["inputs"], x["layout"])

    def score(x):
        _, mass_RW = x["base_forward"]
        return objective.scores(x["params"], x["build"], x["layout"], mass_RW)

    def allocate(x):
        T = x["batch"]["inputs"].shape[1]
        return refocus(new_focus(x["layout"], cfg), x["lens_forward"], cfg, budget=views.budget, tokens=T)

    def whole(x):
        params, ids_RT = x["params"], x["batch"]["inputs"]
        tables = objective.tables(params, ids_RT)
        return views._focus(params, tables, ids_RT, views.lenses[0], x["key"]).layout

    def draw(x):
        R, T = x["batch"]["inputs"].shape
        options = {"block": ctx.block, "levels": ctx.levels, "recent": mix.recent}
        return compress(x["key"], R * mix.variants, T, objective.width, **options)

    def judged(x):
        """What the variants of each row lost; the time does not depend on it."""
        shape = (x["batch"]["inputs"].shape[0], mix.variants)
        return jax.random.uniform(x["key"], shape), jnp.ones(shape, bool)

    def lens(x):
        mass_RW = x["variant"].layout.valid_BW.astype(jnp.float32)
        return objective.lens(x["params"], x["build"], x["variant"], mass_RW, *judged(x))[0]

    def lens_loss(x):
        score_RW = x["variant"].layout.valid_BW.astype(jnp.float32)
        return objective.preference(x["variant"], score_RW, *judged(x))[0]

    stages = {
        "build": lambda x: objective.tables(x["params"], x["batch"]["inputs"]),
        "positional": lambda x: entry_rope(
            objective.cfg, x["layout"], ctx.block, ctx.positions, objective.base.dtype
        ),
        "base_forward": look,
        "lens_forward": score,
        "focus": allocate,
        "runtime_total": whole,
    }
    if mix.variants:
        stages["variant"] = draw
    if mix.lens_weight and mix.variants > 1:
        stages |= {"lens": lens, "lens_loss": lens_loss}
    return {name: jax.jit(stage) for name, stage in stages.items()}
