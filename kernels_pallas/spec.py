"""Who sees whom in gist attention: an exact tiling of the past by rows of several levels.

Level 0 has a row per token, level m one per `block**m` tokens, complete spans only. Every earlier token is seen by
a token query exactly once: the newest `window` tokens and the query's own block as tokens, before them rows of
level 1 up to `mid_spans` spans of level 2, and so on; the last level reaches to the beginning. All ranges are
contiguous inside their level, and none reaches past the end of the query's own span.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class GistSpec:
    """The pattern. Hashable: one compiled program per spec."""

    block: int = 32  # r: rows of a level per row of the next
    window: int = 256  # W: tokens before a query's own block that it sees as tokens
    mid_spans: int | tuple[int, ...] = 1  # M, or per level: spans of the next still shown in its detail
    levels: int = 2  # L: levels above the tokens

    def __post_init__(self):
        if self.block < 2:
            raise ValueError(f"GistSpec: block {self.block} must be at least 2.")
        if self.window < 0 or self.window % self.block:
            raise ValueError(f"GistSpec: window {self.window} must be a multiple of block {self.block}.")
        if self.levels < 1:
            raise ValueError(f"GistSpec: levels {self.levels} must be at least 1.")
        if isinstance(self.mid_spans, tuple) and len(self.mid_spans) != self.levels - 1:
            raise ValueError(
                f"GistSpec: mid_spans {self.mid_spans} must be one number, or {self.levels - 1} for {self.levels} levels."
            )
        if min(self.mid_spans_per_level, default=0) < 0:
            raise ValueError(f"GistSpec: mid_spans {self.mid_spans} cannot be negative.")

    @property
    def mid_spans_per_level(self) -> tuple[int, ...]:
        """M of levels 1, ..., L - 1; the last level reaches to the beginning."""
        if isinstance(self.mid_spans, tuple):
            return self.mid_spans
        return (self.mid_spans,) * (self.levels - 1)

    def deeper(self, levels: int, tokens: int) -> "GistSpec":
        """The same pattern with more levels, of which the first `tokens` tokens of a sequence see none."""
        if levels <= self.levels:
            return self
        # what the last level shows, in spans of the first that is new
        spans = self.lower_bounds(tokens - 1)[-2] // self.block ** (self.levels + 1)
        least = self.mid_spans if isinstance(self.mid_spans, int) else 1
        above = (least,) * (levels - self.levels - 1)
        return replace(self, levels=levels, mid_spans=(*self.mid_spans_per_level, max(least, spans), *above))

    def rows(self, tokens: int) -> tuple[int, ...]:
        """Rows of every level of a sequence of `tokens` tokens."""
        return tuple(tokens // self.block**level for level in range(self.levels + 1))

    def lower_bounds(self, t) -> list:
        """First token that a query at token `t` sees on each level. `t` is an integer, or an array of them."""
        r = self.block
        bounds = [_positive(t // r * r - self.window)]
        for m, spans in enumerate(self.mid_spans_per_level, start=1):
            span = r ** (m + 1)
            bounds.append(_positive((bounds[-1] // span - spans) * span))
        return [*bounds, 0 * bounds[0]]

    def key_ranges(self, level: int, index) -> list["Range"]:
        """The rows of each level that query row `index` of `level` sees; an integer, or an array of them."""
        end = (index + 1) * self.block**level
        bounds = self.lower_bounds(end - 1)
        ranges = [Range(bounds[0], end)]
        for m in range(1, self.levels + 1):
            # a gist query sees its own span on its own and all finer levels
            stop = end if m <= level else bounds[m - 1]
            ranges.append(Range(bounds[m] // self.block**m, stop // self.block**m))
        return ranges


class Range(NamedTuple):
    """Rows start, ..., stop - 1 of a level."""

    start: int
    stop: int


def _positive(x):
    return x * (x > 0)
