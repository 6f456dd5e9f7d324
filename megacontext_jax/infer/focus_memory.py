"""A memory in a flat working context: the whole history in a fixed number of entries, refocused on the way.

Old spans are gists, read from the tree; what the lens finds worth it is opened down to its tokens. The cache holds the
keys of the entries in order, so an edit of the context makes those behind it anew and keeps those before it. Nothing
here grows with the history but the tree.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.context.allocator import AllocatorConfig, EditStats, Focus
from megacontext_jax.context.layout import tapered_layout
from megacontext_jax.context.positions import LONGEST
from megacontext_jax.context.store import TreeStore
from megacontext_jax.infer import focus_programs as programs
from megacontext_jax.infer.focus_programs import FocusConfig, Piece
from megacontext_jax.infer.memory import is_alive, padded_to
from megacontext_jax.infer.model import Model, Region
from megacontext_jax.infer.occurrences import Occurrences

Watch = Callable[[str, dict[str, Any]], None]  # an event's name and fields, see telemetry.names.SPANS


class FocusMemory:
    """Holds the layout on the host and the keys of its entries on the device."""

    capacity = LONGEST

    def __init__(self, cfg: FocusConfig, params, watch: Watch = lambda kind, fields: None):
        """`params` is {"decode": prepared weights, "train": the training pytree}; `watch` is told of every refocus."""
        self.cfg = cfg
        self._watch = watch
        self._params = params
        self.model = Model(cfg.decoder, params["decode"])
        self._queries = cfg.objective.queries
        self._calls = 0
        self.recomputed: Counter[str] = Counter()  # entries, by why
        self.kept = 0  # entries that an edit behind them left alone
        self.edits: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        self._level = self._node = self._age = np.zeros(0, np.int32)
        self._scores = np.zeros(0, np.float32)
        self.tokens = 0
        self._since = 0  # tokens since the last refocus
        self._credit = 0.0  # entries that edits on the way may make anew
        self._occurrences = Occurrences()
        self._new_cache()

    def _new_cache(self) -> None:
        cfg = self.cfg
        cache = cfg.decoder.init_cache(1, cfg.places)
        looks_1QS = jnp.zeros((1, self._queries, cfg.places), jnp.float32)
        self.cache = cache._replace(looks_BQS=looks_1QS)
        self.logits_1V = jnp.zeros((1, cfg.decoder.vocab_size), jnp.float32)
        self._ready = 0  # leading entries whose keys the cache holds

    # --- what a session calls ---

    def warm_up(self) -> None:
        for size in self.cfg.pieces:
            piece, end_1 = programs.any_piece(self.cfg, size), np.ones(1, np.int32)
            self.logits_1V, self.cache = programs.extend(self._params, piece, end_1, self.cache, cfg=self.cfg)
        self.reset()

    def catch_up(self, tree: TreeStore) -> Iterator[int]:
        if not is_alive((self.cache, self.logits_1V)):
            self._new_cache()
        yield from (self.tokens for _ in self._complete(tree))
        if len(tree) - self.tokens <= self.cfg.places - len(self._level):
            self._add_entries(len(tree) - self.tokens)
        elif self.cfg.lens == "learned":
            yield from self._read_with_lens(tree)
        elif len(tree) - self.tokens > self.cfg.budget:
            self._lay_out_anew(len(tree))
        else:
            self._append_raw(len(tree))
        self._since, self._credit = 0, 0.0
        self._bring_up(tree, "append")
        yield self.tokens
        # a gist may open level by level
        resting = replace(self.cfg.allocator, cooldown=0, slack=0, max_replacements=self.cfg.rebuild_edits)
        for _ in range(max(1, self.cfg.rebuild_iterations)):  # the first one sees to the budget
            if not self._iterate(tree, resting):
                break
            yield self.tokens

    def room(self) -> int:
        return max(1, min(self.cfg.interval - self._since, self.cfg.places - len(self._level)))

    def took(self, cache, logits_1V, count: int, tree: TreeStore) -> None:
        self.cache, self.logits_1V = cache, logits_1V
        self._add_entries(count)
        self._ready += count
        self._since += count
        self.recomputed["append"] += count
        self._credit = min(self._credit + self.cfg.recompute * count, self.cfg.places)
        if self._since >= self.cfg.interval:
            self._since = 0
            self._refocus_on_the_way(tree)

    def _refocus_on_the_way(self, tree: TreeStore) -> None:
        """Edits what the tokens since have paid for; early edits, with most behind them, wait the longest."""
        count, recent = len(self._level), self.cfg.allocator.recent
        first = max(0, count - int(self._credit))
        # nothing from `first` on may be edited, whatever the lens says
        if (
            count <= self.cfg.budget
            and first > count - recent - self.cfg.block
            and not self._level[first:].any()
        ):
            self.edits["unpaid"] += 1
            return
        before = sum(self.recomputed.values())
        self._iterate(tree, self.cfg.allocator, self.cfg.iterations, first)
        self._credit = max(0.0, self._credit - (sum(self.recomputed.values()) - before))

    def regions(self) -> list[Region]:
        """Runs of entries of one level, oldest first, with the mean of the scores of the last look."""
        block, found, scored = self.cfg.block, [], []
        for i, (level, node) in enumerate(zip(self._level.tolist(), self._node.tolist(), strict=True)):
            span = block**level
            last = found[-1] if found else None
            if last and last.level == level:
                found[-1] = last._replace(stop=(node + 1) * span, entries=last.entries + 1)
            else:
                found.append(Region(level, node * span, (node + 1) * span, 1))
                scored.append([])
            if i < len(self._scores):  # what has come since the last look has none
                scored[-1].append(self._scores[i])
        return [
            region._replace(score=float(np.mean(scores))) if scores else region
            for region, scores in zip(found, scored, strict=True)
        ]

    def statistics(self) -> dict:
        return {
            "entries": len(self._level),
            "budget": self.cfg.budget,
            "recomputed": dict(self.recomputed),
            "kept": self.kept,
            **self.edits,
        }

    def snapshot(self, most: int | None = None) -> dict[str, np.ndarray]:
        del most  # it is small
        return {
            "level": self._level,
            "node": self._node,
            "age": self._age,
            "tokens": np.array(self.tokens),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        level, node, age = (np.asarray(arrays[name], np.int32) for name in ("level", "node", "age"))
        spans = self.cfg.block ** level.astype(np.int64)
        tokens = int(arrays["tokens"])
        ends = np.cumsum(spans)
        if (
            not len(level) == len(node) == len(age) <= self.cfg.places
            or (ends[-1] if len(ends) else 0) != tokens
            or (node * spans != ends - spans).any()
        ):
            raise ValueError("not a working context")
        self.reset()
        self._level, self._node, self._age, self.tokens = level, node, age, tokens

    # --- the layout ---

    def _add_entries(self, count: int) -> None:
        node = np.arange(self.tokens, self.tokens + count, dtype=np.int32)
        self._level = np.concatenate([self._level, np.zeros(count, np.int32)])
        self._node = np.concatenate([self._node, node])
        self._age = np.concatenate([self._age, np.full(count, self.cfg.allocator.cooldown, np.int32)])
        self.tokens += count

    def _read_with_lens(self, tree: TreeStore) -> Iterator[int]:
        """Takes a long text in piece by piece, and LensNet says at each what to let go of: the model does not look."""
        while self.tokens < len(tree):
            self._add_entries(min(len(tree) - self.tokens, self.cfg.places - len(self._level)))
            if self.tokens < len(tree):
                piece = self._piece(tree, 0, len(self._level), self.cfg.places)
                tokens_1 = np.array([self.tokens], np.int32)
                focus = programs.collapse_unimportant(
                    self._params, piece, self._full(self._age)[0], tokens_1, cfg=self.cfg
                )
                self._keep(jax.device_get(focus))
                yield self.tokens

    def _append_raw(self, tokens: int) -> None:
        """Appends tokens up to `tokens`; where the places end, the oldest entries collapse."""
        while self.tokens < tokens:
            count = min(tokens - self.tokens, self.cfg.places - len(self._level))
            self._add_entries(count)
            if len(self._level) == self.cfg.places and self.tokens < tokens:
                level_1P, node_1P, age_1P = self._full(self._level, self._node, self._age)
                counts = np.array([len(self._level)], np.int32), np.array([self.tokens], np.int32)
                self._keep(
                    jax.device_get(
                        programs.collapse_oldest(
                            level_1P, node_1P, counts[0], age_1P, counts[1], cfg=self.cfg
                        )
                    )
                )

    def _lay_out_anew(self, tokens: int) -> None:
        """A long text pushes everything back: detail falls with distance, whatever was open before."""
        cfg = self.cfg.allocator
        level, node = tapered_layout(
            tokens, self.cfg.budget, block=cfg.block, max_level=cfg.max_level, recent=cfg.recent
        )
        self._replace(level, node, np.full(len(level), cfg.cooldown, np.int32))
        self.tokens = tokens
        self.edits["relayouts"] += 1

    def _keep(self, focus: Focus) -> bool:
        """Takes a layout over from the device; whether it is another one."""
        count = int(focus.layout.valid_BW.sum())
        level, node, age = (
            np.asarray(x[0, :count]) for x in (focus.layout.level_BW, focus.layout.node_BW, focus.age_BW)
        )
        return self._replace(level, node, age)

    def _replace(self, level, node, age) -> bool:
        old = np.stack([self._level, self._node])
        n = min(len(level), old.shape[1])
        differs = (old[:, :n] != np.stack([level, node])[:, :n]).any(0)
        same = int(np.argmax(differs)) if differs.any() else n
        changed = same < max(len(level), old.shape[1])
        self._level, self._node, self._age = level, node, age
        self._scores = self._scores[:same]  # those behind belong to other entries
        self._ready = min(self._ready, same)
        return changed

    def _full(self, *arrays):
        return [np.pad(x, (0, self.cfg.places - len(x)))[None] for x in arrays]

    # --- the device ---

    def _complete(self, tree: TreeStore) -> Iterator[None]:
        """Gists of all that the history has gained, in pieces."""
        before = [tree.count(level) for level in range(tree.spec.max_levels + 1)]
        calls = 0
        for _ in tree.complete():
            calls += 1
            yield
        if calls:
            blocks = sum(tree.count(level) - n for level, n in enumerate(before) if level)
            self._watch(
                "gistnet_usage",
                {"context": "inference", "label": "step", "calls": calls, "block_batches": blocks}
                | {"block_tokens": blocks * self.cfg.block},
            )

    def _piece(self, tree: TreeStore, first: int, stop: int, size: int) -> Piece:
        level, node = self._level[first:stop], self._node[first:stop]
        ids, before = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        gists = np.zeros((size, self.cfg.objective.cfg.n_embd), np.float32)
        for kind in np.unique(level):
            here = np.flatnonzero(level == kind)
            low, high = int(node[here[0]]), int(node[here[-1]]) + 1
            if kind == 0:
                low = max(0, low - 1)
                tokens = tree.tokens(low, high)
                ids[here] = tokens[node[here] - low]
                behind = here[node[here] > 0]
                before[behind] = tokens[node[behind] - 1 - low]
            else:
                gists[here] = tree.gists(int(kind), low, high)[node[here] - low]
        pad = (0, size - len(level))
        return Piece(
            np.pad(level, pad)[None],
            np.pad(node, pad)[None],
            ids[None],
            before[None],
            gists[None],
            np.array([stop - first], np.int32),
        )

    def _bring_up(self, tree: TreeStore, why: str) -> None:
        """The keys of the entries that the cache lacks, and the logits after the last."""
        count = len(self._level)
        # the newest entries tell where the model looks, and must have looked at the context as it is
        first = min(self._ready, max(0, count - self._queries))
        if self._ready == count:
            return
        self.kept += first
        self.recomputed[why] += count - first
        self._watch(
            "kv_cache", {"reason": why, "kept": first, "recomputed": count - first, "wc_length": count}
        )
        self.cache = self.cache._replace(length_B=jnp.array([first], jnp.int32))
        while first < count:
            size = padded_to(count - first, self.cfg.pieces)
            stop = min(count, first + size)
            piece = self._piece(tree, first, stop, size)
            end = (int(self._node[stop - 1]) + 1) * self.cfg.block ** int(self._level[stop - 1])
            self.logits_1V, self.cache = programs.extend(
                self._params, piece, np.array([end], np.int32), self.cache, cfg=self.cfg
            )
            first = stop
        self._ready = count

    def _iterate(self, tree: TreeStore, allocator: AllocatorConfig, passes: int = 1, first: int = 0) -> bool:
        """One look of the lens, the edits it asks for at `first` or behind, the keys anew behind them; whether there
        were any.

        Over the budget the first pass only collapses; expansions take a second one.
        """
        count = len(self._level)
        if count <= self.cfg.budget and not self._level.any():
            return False  # everything is raw and fits
        piece = self._piece(tree, 0, count, self.cfg.places)
        self._calls += 1
        tf_1QP = self._term_counts(tree) if self.cfg.lens == "lexical" else None
        focus, stats, before_1P, after_1P = jax.device_get(
            programs.edit(
                self._params,
                piece,
                self._full(self._age)[0],
                self.cache.looks_BQS,
                tf_1QP,
                np.array([self.tokens], np.int32),
                np.int32(first),
                np.uint32(self._calls),
                cfg=self.cfg,
                allocator=allocator,
                passes=passes,
            )
        )
        expands, collapses = int(stats.expands_B[0]), int(stats.collapses_B[0])
        self.edits["expands"] += expands
        self.edits["collapses"] += collapses
        self.edits["refocuses"] += 1
        self._tell(stats, before_1P[0, :count])
        changed = self._keep(focus)
        self._scores = after_1P[0, : len(self._level)]
        if not changed:
            return False
        list(self._complete(tree))  # what has just collapsed may be shown for the first time
        self._bring_up(tree, "expand" if expands else "collapse")
        return True

    def _tell(self, stats: EditStats, scores: np.ndarray) -> None:
        """What a look found, a score per entry, and the edits it led to."""
        s, count = jax.tree.map(lambda x_B: x_B[0].item(), stats), len(scores)
        self._watch(
            "focus_allocator",
            {
                "tag": "inference_focus",
                "source": self.cfg.lens,
                "edits": s.expands_B + s.collapses_B,
                "swap_rate": s.swap_rate_B,
                "num_expand": s.expands_B,
                "num_collapse": s.collapses_B,
                "wc_length": count,
                "utilization": s.utilization_B,
                "residency_mean": s.residency_mean_B,
                "residency_p95": s.residency_p95_B,
                "score_mean": float(scores.mean()),
                "score_std": float(scores.std()),
                "score_max": float(scores.max()),
                "score_min": float(scores.min()),
            },
        )
        if self.cfg.lens == "learned":
            usage = {"context": "inference", "label": "step", "batched_calls": 1, "batched_variants": 1}
            self._watch(
                "lensnet_usage",
                usage | {"batched_tokens": count, "allocator_calls": 1, "allocator_tokens": count},
            )

    def _term_counts(self, tree: TreeStore) -> np.ndarray:
        """How often each of the newest tokens occurs under every entry, [1, Q, P]."""
        self._occurrences.read(tree)
        span = self.cfg.block ** self._level.astype(np.int64)
        tf_QP = np.zeros((self._queries, self.cfg.places), np.int32)
        newest = tree.tokens(max(0, len(tree) - self._queries))
        for tf_P, token in zip(tf_QP, newest.tolist(), strict=False):
            tf_P[: len(span)] = self._occurrences.count(token, self._node * span, (self._node + 1) * span)
        return tf_QP[None]
