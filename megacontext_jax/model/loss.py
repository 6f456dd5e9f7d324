"""Head, soft cap and cross-entropy in one pass.

At the output of a language model the logits are the largest array of the step, and written naively they are
read and written several times. Both functions walk over slices of the sequence, so that only one slice of
logits exists at a time; the training one computes its gradients in the same pass and scales them in the
backward, which costs exactly the three matrix products.
"""

from functools import partial

import jax
import jax.numpy as jnp


def capped_logits(x_BTC, head_VC, softcap: float, vocab_size: int):
    """Float32 logits [B, T, V]: the head cropped to the vocabulary, then softcap * tanh(z / softcap)."""
    z_BTV = jnp.einsum(
        "btc,vc->btv", x_BTC, head_VC[:vocab_size].astype(x_BTC.dtype), preferred_element_type=jnp.float32
    )
    return softcap * jnp.tanh(z_BTV / softcap)


def reference_nll(x_BTC, head_VC, targets_BT, softcap: float, vocab_size: int):
    """Negative log-likelihood [B, T] in nats, 0 where the target is -1: the plain form."""
    logits_BTV = capped_logits(x_BTC, head_VC, softcap, vocab_size)
    logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    nll_BT = -jnp.take_along_axis(logp_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets_BT >= 0, nll_BT, 0.0)


def chunked_nll(x_BTC, head_VC, targets_BT, softcap: float, vocab_size: int, slices: int = 1):
    """`reference_nll` with one of `slices` slices of logits alive at a time; for evaluation."""

    def slice_nll(args):
        return reference_nll(args[0], head_VC, args[1], softcap, vocab_size)

    nll_nBt = jax.lax.map(slice_nll, (_split(x_BTC, slices), _split(targets_BT, slices)))
    return _join(nll_nBt)


def nll_sum(x_BTC, head_VC, targets_BT, softcap: float, vocab_size: int, slices: int = 1):
    """Sum of the negative log-likelihoods of the targets that are not -1; differentiable in x and head."""
    weights_BT = (targets_BT >= 0).astype(jnp.float32)
    return weighted_nll(x_BTC, head_VC, targets_BT, weights_BT, softcap, vocab_size, slices)[0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_nll(x_BTC, head_VC, targets_BT, weights_BT, softcap: float, vocab_size: int, slices: int = 1):
    """(weighted sum, nats [B, T]); the sum is differentiable in x and head, the nats are for looking at.

    Weights are 0 where the target is -1.
    """
    nll_BT = chunked_nll(x_BTC, head_VC, targets_BT, softcap, vocab_size, slices)
    return (weights_BT * nll_BT).sum(), nll_BT


def _weighted_nll_fwd(x_BTC, head_VC, targets_BT, weights_BT, softcap, vocab_size, slices):
    head = head_VC[:vocab_size].astype(x_BTC.dtype)

    def one_slice(carry, args):
        loss, dhead_VC = carry
        x_BtC, targets_Bt, weights_Bt = args
        z_BtV = jnp.einsum("btc,vc->btv", x_BtC, head, preferred_element_type=jnp.float32)
        t_BtV = jnp.tanh(z_BtV / softcap)
        # |logit| <= softcap, so exp cannot overflow and no maximum is needed
        e_BtV = jnp.exp(softcap * t_BtV)
        sum_Bt1 = e_BtV.sum(-1, keepdims=True)
        weights_Bt1 = weights_Bt[..., None]
        onehot_BtV = jnp.arange(vocab_size) == targets_Bt[..., None]
        picked_Bt1 = jnp.where(onehot_BtV, softcap * t_BtV, 0.0).sum(-1, keepdims=True)
        nll_Bt1 = jnp.where(targets_Bt[..., None] >= 0, jnp.log(sum_Bt1) - picked_Bt1, 0.0)
        loss += (weights_Bt1 * nll_Bt1).sum()
        dlogit_BtV = e_BtV * (weights_Bt1 / sum_Bt1) - jnp.where(onehot_BtV, weights_Bt1, 0.0)
        dz_BtV = (dlogit_BtV * (1.0 - t_BtV * t_BtV)).astype(x_BtC.dtype)
        dx_BtC = jnp.einsum("btv,vc->btc", dz_BtV, head)
        dhead_VC += jnp.einsum("btv,btc->vc", dz_BtV, x_BtC, preferred_element_type=jnp.float32)
        return (loss, dhead_VC), (dx_BtC, nll_Bt1[..., 0])

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    sliced = tuple(_split(x, slices) for x in (x_BTC, targets_BT, weights_BT))
    (loss, dhead_VC), (dx_nBtC, nll_nBt) = jax.lax.scan(one_slice, start, sliced)
    return (loss, _join(nll_nBt)), (_join(dx_nBtC), dhead_VC, head_VC)


def _weighted_nll_bwd(softcap, vocab_size, slices, saved, cotangents):
    del slices
    g, _ = cotangents
    dx_BTC, dhead, head_VC = saved
    padding = head_VC.shape[0] - vocab_size
    dhead_VC = jnp.pad(g * dhead, ((0, padding), (0, 0))).astype(head_VC.dtype)
    return (g * dx_BTC).astype(dx_BTC.dtype), dhead_VC, None, None


weighted_nll.defvjp(_weighted_nll_fwd, _weighted_nll_bwd)


def num_slices(rows: int, T: int, vocab_size: int) -> int:
    """Slices along T so that one slice of a device's float32 logits stays near the budget of the backend."""
    budget = 2**21 if jax.default_backend() == "cpu" else 2**29  # bytes: an L2 cache; a slice of HBM
    n = 1
    while n < T and (rows * T * vocab_size * 4) / n > budget and T % (2 * n) == 0:
        n *= 2
    return n


def _split(x_BT, n: int):
    B, T = x_BT.shape[:2]
    return jnp.moveaxis(x_BT.reshape(B, n, T // n, *x_BT.shape[2:]), 1, 0)


def _join(x_nBt):
    n, B, t = x_nBt.shape[:3]
    return jnp.moveaxis(x_nBt, 0, 1).reshape(B, n * t, *x_nBt.shape[3:])
