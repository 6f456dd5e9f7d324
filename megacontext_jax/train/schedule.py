"""Schedules of nanochat's classic recipe, as functions of the step that work on traced integers."""

import jax.numpy as jnp


def lr_multiplier(num_iterations: int, *, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float):
    """Linear warm-up, constant, linear warm-down to `final_lr_frac`; returns step -> float32 multiplier."""
    warmup = round(warmup_ratio * num_iterations)
    warmdown = max(1, round(warmdown_ratio * num_iterations))

    def multiplier(step):
        step = jnp.asarray(step, jnp.float32)
        up = (step + 1) / max(1, warmup)
        progress = (num_iterations - step) / warmdown
        down = progress + (1 - progress) * final_lr_frac
        flat = jnp.where(step > num_iterations - warmdown, down, 1.0)
        return jnp.where(step < warmup, up, flat)

    return multiplier


def muon_momentum(step):
    """0.85 to 0.95 over the first 300 steps."""
    fraction = jnp.minimum(jnp.asarray(step, jnp.float32) / 300, 1.0)
    return 0.85 + (0.95 - 0.85) * fraction
