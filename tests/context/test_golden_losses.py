"""LensNet's loss against the preference loss that the PyTorch MegaContext means to have.

There an early return skips it; the arrays come from a run without that return. Its targets are given to our loss:
it supervises the worse window of a pair alone, ours both (`entry_targets` is compared where the two agree). Not
compared: the divergence, 0 throughout there (a pass is compared with itself), and the order of the pairs, drawn by
Python's random.Random (the set is compared, and the running mean is fed in that order).
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.layout import compress, starts
from megacontext_jax.context.lens_loss import LensLoss, choose_pairs, entry_targets, lens_loss, pair_losses
from megacontext_jax.context.metrics import lens_statistics
from megacontext_jax.context.positions import gaussian_rope
from tests.conftest import GOLDEN
from tests.context.test_golden import below, lens_as_in_the_fork, lens_of, near, spread_in_the_fork, unrounded

LOSSES = 2e-4
AS_RUN = LensLoss(collapse_weight=1.5, temperature=0.7, smooth_weight=0.05)
BLOCK, MAX_LEVEL, SAMPLES, VARIANTS = 4, 2, 2, 4


def targets_in_the_fork(worse, better, strength: float):
    """Targets of the worse of two windows, each (first tokens, levels).

    The level wanted is that of the better window's entry that begins at the same token, if there is one. A wish
    to collapse holds for all entries of that level under the same parent.
    """
    wanted = dict(zip(*map(np.ndarray.tolist, better), strict=True))
    begin_W, level_W = worse
    target_W = np.zeros(len(begin_W), np.float32)
    for i, (begin, level) in enumerate(zip(begin_W.tolist(), level_W.tolist(), strict=True)):
        change = wanted.get(begin, level) - level
        if change < 0 < level:
            target_W[i] = strength
        if change > 0 and level < MAX_LEVEL:
            parent = BLOCK ** (level + 1)
            target_W[(level_W == level) & (begin_W // parent == begin // parent)] = -strength
    return target_W


@pytest.fixture(scope="module")
def z():
    return dict(np.load(GOLDEN / "megacontext/lens_loss_intended.npz"))


@pytest.fixture(scope="module")
def windows(z):
    """(positions, levels, scores, embeddings), each with the samples and variants on axis 0."""
    names = [f"sample{s}/var{v}" for s in range(SAMPLES) for v in range(VARIANTS)]
    columns = [[z[f"{n}/{what}"] for n in names] for what in ("positions", "lods", "scores")]
    return [np.stack(column) for column in columns] + [np.concatenate([z[f"{n}/embeddings"] for n in names])]


@pytest.fixture(scope="module")
def pairs(z, windows):
    """Of all pairs in the order of the run: the worse window, the difference, the targets and the prefix."""
    begin_RW, level_RW, *_ = windows
    rows, deltas, targets, prefixes = [], [], [], []
    for s in range(SAMPLES):
        for p, (better, worse) in enumerate(z[f"sample{s}/pairs_better_worse"]):
            a, b = s * VARIANTS + worse, s * VARIANTS + better
            delta = z[f"sample{s}/pairs_strength"][p]
            rows.append(a)
            deltas.append(delta)
            targets.append(
                targets_in_the_fork((begin_RW[a], level_RW[a]), (begin_RW[b], level_RW[b]), math.tanh(delta))
            )
            prefixes.append(f"group{s}/pair{p}/")
    return np.array(rows), np.float32(deltas), np.stack(targets), prefixes


def losses_of(cfg: LensLoss, windows, pairs, score_RW=None):
    _, level_RW, given_RW, _ = windows
    rows, delta_P, target_PW, _ = pairs
    score_RW = given_RW if score_RW is None else score_RW
    span_RW = np.float32(BLOCK**level_RW)
    return pair_losses(cfg, score_RW[rows], target_PW, span_RW[rows], delta_P)


def test_the_same_pairs_are_chosen(z):
    loss_BN = np.float32(
        [[z[f"sample{s}/var{v}/token_loss"] for v in range(VARIANTS)] for s in range(SAMPLES)]
    )
    chosen = choose_pairs(loss_BN, np.ones(loss_BN.shape, bool), max_pairs=8, hard_negative_ratio=1.0)
    for s in range(SAMPLES):
        theirs = z[f"sample{s}/pairs_better_worse"]
        ours = {(int(better), int(worse)) for worse, better in np.argwhere(chosen.worse_BNN[s])}
        assert ours == set(map(tuple, theirs.tolist()))
        delta_P = chosen.delta_BNN[s][theirs[:, 1], theirs[:, 0]]
        np.testing.assert_allclose(delta_P, z[f"sample{s}/pairs_strength"], atol=1e-6)


@pytest.mark.parametrize(("max_pairs", "ratio"), [(8, 1.0), (3, 1.0), (6, 0.5), (20, 0.25)])
def test_pairs_under_limits(max_pairs, ratio):
    """The rule as a loop: the best against all others, the furthest first, then the furthest of the rest."""
    loss_BN = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    chosen = choose_pairs(loss_BN, np.ones(loss_BN.shape, bool), max_pairs, ratio)
    for loss_N, worse_NN in zip(loss_BN, np.asarray(chosen.worse_BNN), strict=True):
        best, *others = np.argsort(loss_N)
        primary = [(other, best) for other in reversed(others)]
        rest = [(b, a) for a, b in itertools.combinations(others, 2)]
        rest.sort(key=lambda pair: loss_N[pair[1]] - loss_N[pair[0]])
        rest = rest[: math.ceil(ratio * len(rest))]
        assert {tuple(pair) for pair in np.argwhere(worse_NN)} == set((primary + rest)[:max_pairs])


def test_terms_of_every_pair(z, windows, pairs):
    """Targets, preference term and sign agreement, pair by pair."""
    rows, _, target_PW, prefixes = pairs
    _, level_RW, score_RW, _ = windows
    alone = replace(AS_RUN, rank_weight=0.0, budget_weight=0.0)
    pref_P, _, agrees_P, supervised_P = losses_of(alone, windows, pairs)
    assert supervised_P.all()
    for p, prefix in enumerate(prefixes):
        asked_W = target_PW[p] != 0
        np.testing.assert_allclose(target_PW[p][asked_W], z[prefix + "targets"], rtol=1e-6)
        np.testing.assert_array_equal(score_RW[rows[p]][asked_W], z[prefix + "scores"])
        np.testing.assert_array_equal(BLOCK ** level_RW[rows[p]][asked_W], z[prefix + "spans"])
        near(pref_P[p], z[prefix + "pref_loss"], LOSSES)
        assert agrees_P[p] == (z[prefix + "alignment"] > 0)


def test_loss_with_every_term(z, windows, pairs):
    """Pair by pair, from the means over ever more of them: the running mean goes on from one to the next."""
    losses_P, imbalance_P, _, supervised_P = losses_of(AS_RUN, windows, pairs)
    P = len(supervised_P)
    means = [
        lens_loss(AS_RUN, losses_P, imbalance_P, supervised_P & (np.arange(P) < n)) for n in range(1, P + 1)
    ]
    ours_P = np.diff(np.arange(1, P + 1) * np.float64(means), prepend=0)
    for ours, prefix in zip(ours_P, pairs[-1], strict=True):
        near(ours, z[prefix + "total_loss"], LOSSES)
    near(means[-1], z["lens_loss_full"], LOSSES)


def test_statistics(z, windows, pairs):
    rows, _, target_PW, _ = pairs
    *_, agrees_P, supervised_P = losses_of(AS_RUN, windows, pairs)
    score_RW = jnp.asarray(windows[2])
    score_PW = score_RW[rows]
    of_pairs = score_PW[None, :, None], jnp.asarray(target_PW)[None, :, None]  # [B, N, M, W]
    stats = lens_statistics(0.0, score_RW, *of_pairs, agrees_P, supervised_P)
    near(stats["agreeing"] / stats["pairs"], z["preference_agreement"])
    near(stats["span_corr"], z["span_score_corr"], LOSSES)
    near(stats["score_abs"], z["policy_stats_abs_std"][0], LOSSES)
    near(stats["score_std"], z["policy_stats_abs_std"][1], LOSSES)


def test_gradient_of_the_lens(z, windows, pairs, monkeypatch):
    """Through LensNet as the fork runs it: causal, sigma on the length of the row (64), all windows one batch."""
    begin_RW, level_RW, score_RW, x_RWC = windows
    params, cfg = lens_of(below(z, "lens_w/"))
    plain, sigma_RW = unrounded(cfg.gpt, monkeypatch), spread_in_the_fork(level_RW, 64)
    tables = gaussian_rope(plain, begin_RW, sigma_RW, jnp.bfloat16)
    rope = [table.astype(jnp.float32) for table in tables]

    @jax.jit
    def loss(params):
        scores = lens_as_in_the_fork(params, cfg, x_RWC, rope, level_RW, begin_RW)
        losses_P, imbalance_P, _, supervised_P = losses_of(AS_RUN, windows, pairs, scores)
        return lens_loss(AS_RUN, losses_P, imbalance_P, supervised_P), scores

    (value, scores), grads = jax.value_and_grad(loss, has_aux=True)(params)
    near(scores, score_RW)
    near(value, z["lens_loss_full"], LOSSES)
    near(grads["scorer"]["hidden"]["weight"], z["grad_lens/scorer.0.weight"], LOSSES)


# --- Targets ----------------------------------------------------------------------------------------------


def test_targets_by_hand():
    """Raw, raw, gist, gist, upper gist; 0.5 as the other context is better by that much."""
    level_W = jnp.array([0, 0, 1, 1, 2])
    other_W = jnp.array([0, 1, 0, 2, 2])
    np.testing.assert_array_equal(entry_targets(level_W, other_W, 0.5, 2), [0, -0.5, 0.5, -0.5, 0])
    np.testing.assert_array_equal(entry_targets(level_W, other_W, 0.5, 1), [0, -0.5, 0.5, 0, 0])
    # the same pair from the better side: keep what the worse one lacks
    np.testing.assert_array_equal(entry_targets(other_W, level_W, -0.5, 2), [0, -0.5, 0.5, -0.5, 0])


def test_targets_in_aligned_windows_of_one_level_equal_the_forks():
    """Where every block is raw or one gist, both rules ask the same of the worse window."""
    draw = partial(compress, rows=6, tokens=64, width=40, block=BLOCK, levels=1, recent=8)
    layout, shown_RN = jax.jit(draw)(jax.random.key(3))
    begin_RW, level_RW = np.asarray(starts(layout, BLOCK)), np.asarray(layout.level_BW)
    assert len({tuple(row) for row in level_RW.tolist()}) > 3
    tail_R2 = np.zeros((6, 2), np.int32)  # the blocks of the raw tail
    shown_RN = np.concatenate([shown_RN, tail_R2], axis=1)
    other_RRW = shown_RN[:, begin_RW // BLOCK].swapaxes(0, 1)  # [worse, better, W]
    ours_RRW = entry_targets(level_RW[:, None], other_RRW, 0.7, MAX_LEVEL)
    for worse, better in itertools.permutations(range(6), 2):
        theirs_W = targets_in_the_fork(
            *((begin_RW[row], level_RW[row]) for row in (worse, better)), strength=0.7
        )
        np.testing.assert_allclose(ours_RRW[worse, better], theirs_W)
