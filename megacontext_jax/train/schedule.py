"""Schedules of nanochat's recipes, as functions of the step that work on traced integers."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from megacontext_jax.errors import UserError
from megacontext_jax.train.recipes import CLASSIC_MOMENTUM, Momentum, Recipe


class Schedules(NamedTuple):
    """Functions of the step."""

    rate: Callable  # multiplier of every learning rate
    momentum: Callable  # Muon's
    decay: Callable  # multiplier of Muon's weight decay


def schedules(opts, recipe: Recipe, num_iterations: int, *, first_stage: bool) -> Schedules:
    """The schedules of a stage with options `opts`; the recipe's own momentum is that of the first stage."""
    if opts.warmup_steps and opts.warmup_ratio:
        raise UserError(
            f"--warmup-steps {opts.warmup_steps} and --warmup-ratio {opts.warmup_ratio} are both set; set one to 0."
        )
    return Schedules(
        lr_multiplier(
            num_iterations,
            warmup=opts.warmup_steps or round(opts.warmup_ratio * num_iterations),
            warmdown_ratio=opts.warmdown_ratio,
            final_lr_frac=opts.final_lr_frac,
        ),
        muon_momentum(
            recipe.momentum if first_stage else CLASSIC_MOMENTUM,
            num_iterations,
            round(opts.warmdown_ratio * num_iterations),
        ),
        decay_multiplier(recipe.decay_schedule, num_iterations),
    )


def lr_multiplier(num_iterations: int, *, warmup: int, warmdown_ratio: float, final_lr_frac: float):
    """Linear over `warmup` steps, constant, linear warm-down to `final_lr_frac`; step -> float32 multiplier."""
    warmdown = max(1, round(warmdown_ratio * num_iterations))

    def multiplier(step):
        step = jnp.asarray(step, jnp.float32)
        up = (step + 1) / max(1, warmup)
        progress = (num_iterations - step) / warmdown
        down = progress + (1 - progress) * final_lr_frac
        flat = jnp.where(step > num_iterations - warmdown, down, 1.0)
        return jnp.where(step < warmup, up, flat)

    return multiplier


def muon_momentum(shape: Momentum = CLASSIC_MOMENTUM, num_iterations: int = 0, warmdown: int = 0):
    """step -> momentum; the way up wins over the way down where they overlap."""

    def momentum(step):
        step = jnp.asarray(step, jnp.float32)
        up = shape.start + (shape.peak - shape.start) * jnp.minimum(step / shape.steps, 1.0)
        if shape.final is None:
            return up
        progress = jnp.clip((step - (num_iterations - warmdown)) / max(1, warmdown), 0.0, 1.0)
        return jnp.where(step < shape.steps, up, shape.peak + (shape.final - shape.peak) * progress)

    return momentum


def decay_multiplier(shape: str, num_iterations: int):
    """step -> multiplier of Muon's weight decay: constant, or linear or cosine to zero at the end."""

    def multiplier(step):
        progress = jnp.asarray(step, jnp.float32) / num_iterations
        if shape == "linear":
            return 1.0 - progress
        if shape == "cosine":
            return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.ones_like(progress)

    return multiplier
