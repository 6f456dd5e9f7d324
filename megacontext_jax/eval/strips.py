"""At which level of detail a working context shows every token, as numbers and as one line of characters."""

import numpy as np

from megacontext_jax.context.layout import Layout, spans, starts


def token_levels(layout: Layout, block: int, tokens: int) -> np.ndarray:
    """int [B, T]: the level at which each token is shown; -1 where it is not."""
    level, valid = np.asarray(layout.level_BW), np.asarray(layout.valid_BW)
    begin, span = np.asarray(starts(layout, block)), np.asarray(spans(layout.level_BW, block))
    shown = np.full((level.shape[0], tokens), -1)
    for b, w in zip(*np.nonzero(valid), strict=True):
        shown[b, begin[b, w] : begin[b, w] + span[b, w]] = level[b, w]
    return shown


def ascii_strip(levels_T: np.ndarray, block: int, recent: int = 0) -> str:
    """One character per block: raw `.`, level 1 `─`, 2 `═`, above `█`, hidden `X`, the raw tail `⊙`."""
    marks = {-1: "X", 0: ".", 1: "─", 2: "═"}
    tail = len(levels_T) - recent
    strip = [
        "⊙" if at + block > tail else marks.get(int(levels_T[at]), "█")
        for at in range(0, len(levels_T), block)
    ]
    return "".join(strip)
