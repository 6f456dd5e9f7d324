"""Working contexts as integer arrays, and how they are drawn.

An entry (level, node) stands for the tokens [node K^level, (node + 1) K^level); level 0 is a raw token. A
`Layout` lists the entries of each row from the oldest to the newest; unused places are at the end. In a legal layout

* the valid entries are at most the budget (budget),
* they tile [0, T) without gap or overlap (contiguity),
* nodes are whole numbers, so that every gist starts on a multiple of its own span (alignment),
* no level is above the highest, and no gist reaches into the last `recent` tokens, which stay raw (legality, tail).

Shape suffixes: B rows, W entries, T tokens, N level-1 blocks that may be compressed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.errors import UserError


class Layout(NamedTuple):
    level_BW: jax.Array
    node_BW: jax.Array
    valid_BW: jax.Array

    @property
    def count_B(self):
        return self.valid_BW.sum(-1)


def spans(level, block: int):
    """Tokens that an entry of each level covers."""
    return jnp.int32(block) ** level


def starts(layout: Layout, block: int):
    """First token of every entry."""
    return layout.node_BW * spans(layout.level_BW, block)


def last_tokens(layout: Layout, block: int):
    """Last token of every entry; the entry predicts the one after it."""
    return (layout.node_BW + 1) * spans(layout.level_BW, block) - 1


def raw_layout(rows: int, tokens: int) -> Layout:
    node = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    return Layout(jnp.zeros_like(node), node, jnp.ones(node.shape, bool))


def append_raw(layout: Layout, tokens: int, new: int) -> Layout:
    """The layout of `tokens` tokens with the next `new` ones raw behind it; `new` places wider."""
    level, node, valid = (jnp.pad(x, ((0, 0), (0, new))) for x in layout)
    rows_B1 = jnp.arange(level.shape[0])[:, None]
    places_Bn = layout.count_B[:, None] + jnp.arange(new)
    return Layout(
        level.at[rows_B1, places_Bn].set(0),
        node.at[rows_B1, places_Bn].set(tokens + jnp.arange(new)),
        valid.at[rows_B1, places_Bn].set(True),
    )


def violations(layout: Layout, *, block: int, tokens, budget: int, recent: int, max_level: int) -> dict:
    """Per invariant, bool [B]: whether the layout breaks it. `tokens` is a number or [B]."""
    level, node, valid = layout
    W = valid.shape[-1]
    tokens_B = jnp.broadcast_to(jnp.asarray(tokens), valid.shape[:-1])
    begin, end = starts(layout, block), last_tokens(layout, block) + 1
    count_B = layout.count_B
    packed_B = (valid == (jnp.arange(W) < count_B[:, None])).all(-1)
    follows = jnp.where(valid[:, 1:], begin[:, 1:] == end[:, :-1], True).all(-1)
    last_end = jnp.max(jnp.where(valid, end, 0), axis=-1)
    tail_B1 = tokens_B[:, None] - recent
    return {
        "budget": count_B > budget,
        "contiguity": ~(packed_B & follows & (begin[:, 0] == 0) & (last_end == tokens_B)),
        "alignment": (valid & (begin % spans(level, block) != 0)).any(-1),
        "legality": (valid & ((level < 0) | (level > max_level) | (node < 0))).any(-1),
        "tail": (valid & (level > 0) & (end > tail_B1)).any(-1),
    }


# --- A layout of any length -----------------------------------------------------------------------------


def tapered_layout(
    tokens: int, budget: int, *, block: int, max_level: int, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    """(level, node) of a history laid out so that detail falls with distance; at most `budget` entries.

    The newest half of the budget are tokens, the rest is shared by the levels alike. Not jitted: the cost is that of the
    entries, whatever the length of the history. UserError if no such layout fits.
    """
    if tokens <= budget:
        return np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32)

    def runs(raw: int, share: int) -> list[tuple[int, int, int]]:
        """(level, first node, end) from the newest on: `share` nodes per level, and up to the next whole parent."""
        found, end = [], tokens
        begin = max(0, tokens - max(raw, recent)) // block * block
        for level in range(max_level + 1):
            span = block**level
            if level:
                begin = max(0, end - share * span) // (span * block) * (span * block)
            if level == max_level:
                begin = 0
            found.append((level, begin // span, end // span))
            end = begin
        return found

    def size(found) -> int:
        return sum(end - begin for _, begin, end in found)

    raw = budget // 2
    while size(runs(raw, 0)) > budget and raw > recent:
        raw = max(recent, raw - block)
    share = 0
    while share < budget and size(runs(raw, share + 1)) <= budget:
        share += 1
    while raw < tokens and size(runs(raw + block, share)) <= budget:
        raw += block
    found = runs(raw, share)
    if size(found) > budget:
        raise UserError(
            f"{tokens:,} tokens cannot be shown in {budget} entries: blocks of {block}, {max_level} levels and {recent} "
            f"raw tokens at the end take {size(found)}; allow more entries, or fewer recent tokens."
        )
    found = [(level, np.arange(begin, end)) for level, begin, end in reversed(found)]
    level = np.concatenate([np.full(len(nodes), level) for level, nodes in found])
    return level.astype(np.int32), np.concatenate([nodes for _, nodes in found]).astype(np.int32)


def enough_entries(*, block: int, levels: int, recent: int) -> int:
    """Entries into which any history of up to block^(levels + 1) tokens fits, whatever its length leaves over."""
    return recent + (block - 1) * levels + block


# --- Layouts of a given width ----------------------------------------------------------------------------


def reachable_width(target: int, tokens: int, *, block: int, levels: int, recent: int) -> int:
    """The largest width of at most `target` entries that compression reaches exactly.

    Every collapse, at any level, replaces `block` entries by one.
    """
    collapses = -(-max(0, tokens - target) // (block - 1))
    most = sum(_head_nodes(tokens, block, levels, recent))
    if collapses > most:
        fewest = tokens - most * (block - 1)
        raise UserError(
            f"{tokens} tokens cannot be shown in {target} entries: blocks of {block}, {levels} levels and {recent} "
            f"raw tokens at the end leave at least {fewest}; allow more entries or more levels, or fewer recent tokens."
        )
    return tokens - collapses * (block - 1)


def fewest_entries(tokens: int, *, block: int, levels: int, recent: int) -> int:
    """Entries when everything that may be compressed is."""
    return tokens - sum(_head_nodes(tokens, block, levels, recent)) * (block - 1)


def _head_nodes(tokens: int, block: int, levels: int, recent: int) -> list[int]:
    """Whole nodes per level, from level 1, outside the protected tail."""
    head = max(0, tokens - recent)
    return [head // block**level for level in range(1, levels + 1)]


class Cut(NamedTuple):
    """A layout together with the level at which each level-1 block of the head is shown."""

    layout: Layout
    block_level_BN: jax.Array


def compress(
    key,
    rows: int,
    tokens: int,
    width: int,
    *,
    block: int,
    levels: int,
    recent: int,
    oldest_first=False,
) -> Cut:
    """Layouts of exactly `width` entries: aligned compressions of the head before a raw tail.

    Drawn at random: how many nodes of each upper level, then which ones, by an order between "oldest first" and
    "any" that differs from row to row. In rows that are `oldest_first` (a bool, or one per row) nothing is random:
    as many upper nodes as fit, at the oldest places, so that detail falls with distance and the raw tail is the
    longest. `width` must be reachable (`reachable_width`).
    """
    oldest_B = jnp.broadcast_to(oldest_first, rows)
    available = _head_nodes(tokens, block, levels, recent)
    N = available[0] if available else 0
    open_B = jnp.full(rows, (tokens - width) // (block - 1), jnp.int32)  # collapses still to make
    level_BN = jnp.zeros((rows, N), jnp.int32)
    tau_B1 = jnp.exp(jax.random.uniform(jax.random.fold_in(key, 0), (rows, 1), minval=-2.5, maxval=2.5))
    for level in range(levels, 0, -1):
        n = available[level - 1]
        if n == 0:
            continue
        children = block ** (level - 1)
        free_Bn = level_BN[:, : n * children].reshape(rows, n, children).max(-1) == 0
        if level == 1:
            take_B = open_B
        else:
            # collapses inside the blocks that are still free, at the levels below
            below_B = sum(
                (level_BN[:, : m * block ** (k - 1)].reshape(rows, m, -1).max(-1) == 0).sum(-1)
                for k, m in enumerate(available[: level - 1], 1)
            )
            whole = sum(block**j for j in range(level))  # collapses that one such node takes
            least_B = jnp.clip(open_B - below_B, 0)
            most_B = jnp.maximum(least_B, jnp.minimum(free_Bn.sum(-1), open_B // whole))
            share_B = jax.random.uniform(jax.random.fold_in(key, 2 * level), (rows,)) ** 2
            extra_B = jnp.floor(share_B * (most_B - least_B + 1)).astype(jnp.int32)
            take_B = jnp.where(oldest_B, most_B, least_B + jnp.minimum(extra_B, most_B - least_B))
            open_B = open_B - take_B * whole
        noise_Bn = tau_B1 * jax.random.uniform(jax.random.fold_in(key, 2 * level + 1), (rows, n))
        order_Bn = jnp.arange(n) / n + jnp.where(oldest_B[:, None], 0.0, noise_Bn)
        order_Bn = jnp.where(free_Bn, order_Bn, jnp.inf)
        # by sorting: compared pairwise, a value that XLA computes twice may differ from itself in the last bit
        rank_Bn = jnp.argsort(jnp.argsort(order_Bn, axis=1), axis=1)
        chosen_Bn = free_Bn & (rank_Bn < take_B[:, None])
        chosen_BN = jnp.repeat(chosen_Bn, children, axis=1)
        chosen_BN = jnp.pad(chosen_BN, ((0, 0), (0, N - n * children)))
        level_BN = jnp.where(chosen_BN, level, level_BN)
    return Cut(_from_blocks(level_BN, tokens, width, block), level_BN)


def _from_blocks(level_BN, tokens: int, width: int, block: int) -> Layout:
    """Entries of blocks shown at given levels; what follows the blocks is raw."""
    rows, N = level_BN.shape
    if N == 0:
        return raw_layout(rows, tokens)
    first_BN = jnp.arange(N) % (jnp.int32(block) ** jnp.maximum(level_BN - 1, 0)) == 0
    size_BN = jnp.where(level_BN == 0, block, first_BN.astype(jnp.int32))
    ends_BN = jnp.cumsum(size_BN, axis=1)
    slot_W = jnp.arange(width)
    of_BW = (ends_BN[:, None, :] <= slot_W[:, None]).sum(-1)  # the block of each entry; N: the tail
    inside_BW = jnp.minimum(of_BW, N - 1)
    level_BW = jnp.where(of_BW < N, jnp.take_along_axis(level_BN, inside_BW, axis=1), 0)
    begin_BW = jnp.take_along_axis(ends_BN - size_BN, inside_BW, axis=1)
    token_BW = jnp.where(of_BW < N, inside_BW * block + slot_W - begin_BW, tokens - width + slot_W)
    node_BW = jnp.where(
        level_BW == 0, token_BW, inside_BW // jnp.int32(block) ** jnp.maximum(level_BW - 1, 0)
    )
    return Layout(level_BW, node_BW, jnp.ones((rows, width), bool))
