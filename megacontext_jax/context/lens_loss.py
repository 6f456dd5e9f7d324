"""What LensNet learns from: pairs of working contexts of one sequence, of which one predicts better.

In the worse context an entry is to be expanded where the better one shows its span finer and collapsed where it
shows it coarser, the more the further apart the two are; in the better context the opposite holds, else every gist
would be asked to expand and none ever to stay. (The PyTorch fork means to supervise the worse one alone.) Shape suffixes: B sequences,
P pairs or P = N * N ordered pairs of N contexts, W entries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class LensLoss:
    rank_weight: float = 0.5
    budget_weight: float = 0.1
    margin: float = 0.1
    collapse_weight: float = 1.0
    temperature: float = 1.0
    kl_weight: float = 0.0
    smooth_weight: float = 0.0
    smooth_beta: float = 0.9
    hard_negative_ratio: float = 1.0
    max_pairs: int = 8


class Pairs(NamedTuple):
    """Ordered pairs (n, m) of the N contexts of a sequence."""

    worse_BNN: jax.Array  # bool: n is the worse one of a pair that is used
    delta_BNN: jax.Array  # loss of n minus loss of m

    @property
    def used_BNN(self):
        return self.worse_BNN | self.worse_BNN.swapaxes(1, 2)


def choose_pairs(loss_BN, usable_BN, max_pairs: int, hard_negative_ratio: float) -> Pairs:
    """The best context against every other, then the furthest of the other pairs while there is room."""
    N = loss_BN.shape[1]
    delta_BNN = loss_BN[:, :, None] - loss_BN[:, None, :]
    both_BNN = usable_BN[:, :, None] & usable_BN[:, None, :]
    index = jnp.arange(N)
    later_NN = index[:, None] > index  # of two equal ones the earlier counts as better
    worse_BNN = both_BNN & ((delta_BNN > 0) | ((delta_BNN == 0) & later_NN))
    best_B = jnp.argmin(jnp.where(usable_BN, loss_BN, jnp.inf), axis=1)
    primary_BNN = worse_BNN & (index == best_B[:, None])[:, None, :]
    others_BNN = worse_BNN & ~primary_BNN
    keep_B = jnp.ceil(hard_negative_ratio * others_BNN.sum((1, 2)))
    others_BNN &= _rank(delta_BNN, others_BNN) < keep_B[:, None, None]
    order_BNN = delta_BNN + jnp.where(primary_BNN, 1e6, 0.0)
    used_BNN = primary_BNN | others_BNN
    return Pairs(used_BNN & (_rank(order_BNN, used_BNN) < max_pairs), delta_BNN)


def _rank(value_BNN, among_BNN):
    """Place of each value among those marked, the largest first."""
    B = value_BNN.shape[0]
    flat_BP = jnp.where(among_BNN, value_BNN, -jnp.inf).reshape(B, -1)
    order_BP = jnp.argsort(-flat_BP, axis=1, stable=True)
    return jnp.argsort(order_BP, axis=1).reshape(value_BNN.shape)


def entry_targets(level, other_level, advantage, max_level: int):
    """Signed targets [..., W] of a context's entries, from how another context shows the same places.

    `advantage` in (-1, 1) is positive where the other context is better.
    """
    finer = (other_level < level) & (level > 0)
    coarser = (other_level > level) & (level < max_level)
    return jnp.where(finer, advantage, jnp.where(coarser, -advantage, 0.0))


def pair_losses(cfg: LensLoss, score_PW, target_PW, span_PW, delta_P):
    """(losses [P] without smoothing, budget imbalance [P], agreement [P], supervised [P]).

    Targets are 0 where nothing is asked; pairs without any target have loss 0 and are not supervised.
    """
    asked_PW = target_PW != 0
    count_P = asked_PW.sum(-1)
    sign_PW = jnp.sign(target_PW)
    scale_P1 = (jnp.maximum(1.0, jnp.abs(delta_P)) / cfg.temperature)[:, None]
    weight_PW = jnp.abs(target_PW) * jnp.where(target_PW < 0, cfg.collapse_weight, 1.0)
    losses_PW = jax.nn.softplus(-sign_PW * score_PW * scale_P1) * weight_PW
    total_P = _mean(losses_PW, asked_PW)

    up_PW, down_PW = target_PW > 0, target_PW < 0
    gap_P = _mean(score_PW, up_PW) - _mean(score_PW, down_PW)
    both_P = up_PW.any(-1) & down_PW.any(-1)
    total_P += cfg.rank_weight * jnp.where(both_P, jax.nn.relu(cfg.margin - gap_P), 0.0)

    expand_P = jnp.where(asked_PW, span_PW * jax.nn.relu(score_PW), 0.0).sum(-1)
    collapse_P = jnp.where(asked_PW, span_PW * jax.nn.relu(-score_PW), 0.0).sum(-1)
    imbalance_P = (expand_P - collapse_P) / (expand_P + collapse_P + 1e-6)
    total_P += cfg.budget_weight * jnp.square(imbalance_P)
    if cfg.kl_weight:  # symmetric divergence from the undecided policy
        p_PW = jnp.clip(jax.nn.sigmoid(score_PW / cfg.temperature), 1e-6, 1 - 1e-6)
        logit_PW = jnp.log(p_PW / (1 - p_PW))
        total_P += cfg.kl_weight * _mean(0.5 * (p_PW - 0.5) * logit_PW, asked_PW)
    agreement_P = _mean(score_PW * sign_PW, asked_PW) > 0
    return total_P, imbalance_P, agreement_P, count_P > 0


def lens_loss(cfg: LensLoss, losses_P, imbalance_P, supervised_P):
    """Mean over the supervised pairs, with the imbalance drawn towards its running mean (from 0, in pair order)."""
    if cfg.smooth_weight:

        def follow(mean, xs):
            value, counts = xs
            new = jnp.where(counts, cfg.smooth_beta * mean + (1 - cfg.smooth_beta) * value, mean)
            return new, new

        running_P = jax.lax.scan(follow, 0.0, (jax.lax.stop_gradient(imbalance_P), supervised_P))[1]
        losses_P += cfg.smooth_weight * jnp.square(imbalance_P - running_P)
    return _mean(losses_P, supervised_P)


def _mean(x, mask):
    """Mean over the last axis where the mask is set; 0 where it is empty."""
    return jnp.where(mask, x, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)
