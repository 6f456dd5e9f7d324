"""The Mosaic GPU kernels, interpreted on the CPU, against the float32 reference: forward and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import GistSpec, Refused, gist_attention
from kernels_pallas.api import choose
from kernels_pallas.mosaic_gpu import gist_attention_mosaic, refusal
from kernels_pallas.mosaic_gpu.config import Config
from kernels_pallas.shapes import Problem
from tests.kernels.interpret import interpreted

PROBLEMS = {
    "odd length, heads of 128": (Problem(301, GistSpec(8, 16, 1, 2), 1, 2, 1, 128), None),
    "full tiles, three queries per key head": (Problem(500, GistSpec(32, 384, 1, 2), 1, 3, 1, 64), None),
    "less than a block, narrow key tiles": (Problem(5, GistSpec(8, 16, 1, 2), 2, 1, 1, 64), Config(64, 3, 3)),
    "blocks of 128, one level, no window": (
        Problem(520, GistSpec(128, 0, 1, 1), 1, 1, 1, 64),
        Config(64, 2, 2),
    ),
    "no middle, three levels": (Problem(260, GistSpec(8, 8, 0, 3), 1, 2, 2, 64), None),
}


def run(problem: Problem, implementation, segment_ids=None):
    q, k, v, do = problem.arrays(dtype=jnp.bfloat16)
    if implementation == "reference":
        q, k, v, do = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, do))

    def attend(q, k, v):
        if implementation == "reference":
            return gist_attention(
                q, k, v, spec=problem.spec, segment_ids=segment_ids, implementation="reference"
            )
        scale = problem.head_dim**-0.5
        return gist_attention_mosaic(q, k, v, problem.spec, segment_ids, scale, implementation, interpreted())

    out, gradients = jax.vjp(attend, q, k, v)
    return out, *gradients(do)


def error(ours, theirs) -> float:
    """Of all levels, relative to their norm; NaN counts as infinite."""
    ours, theirs = (np.concatenate([np.asarray(x, np.float32).ravel() for x in y]) for y in (ours, theirs))
    found = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return float(found) if np.isfinite(found) else np.inf


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_are_the_reference(name):
    problem, config = PROBLEMS[name]
    found, wanted = run(problem, config), run(problem, "reference")
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert [x.dtype for x in ours] == [jnp.bfloat16] * len(ours)
        assert error(ours, theirs) < 5e-3, what


def test_documents_do_not_see_each_other_and_two_runs_are_alike():
    problem = Problem(128, GistSpec(8, 64, 1, 2), 2, 1, 1, 64)
    # documents begin on multiples of 64; the rows of the batch are packed differently
    segment_ids = jnp.stack([jnp.repeat(jnp.array([0, 1]), 64), jnp.repeat(jnp.array([5, 5]), 64)])
    found = run(problem, None, segment_ids)
    for ours, theirs in zip(found, run(problem, "reference", segment_ids), strict=True):
        assert error(ours, theirs) < 5e-3
    assert error(found[0], run(problem, "reference")[0]) > 0.1
    again = run(problem, None, segment_ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_what_does_not_run_says_why():
    spec = GistSpec()
    assert refusal(spec, jnp.bfloat16, 128, 9.0) is None
    for options, words in (
        ((spec, jnp.bfloat16, 128, None), "no NVIDIA GPU"),
        ((spec, jnp.bfloat16, 128, 12.0), "Hopper"),
        ((spec, jnp.float32, 128, 9.0), "TF32"),
        ((spec, jnp.bfloat16, 96, 9.0), "96"),
        ((GistSpec(levels=60), jnp.bfloat16, 128, 9.0), "shared memory"),
    ):
        assert words in refusal(*options)


def test_a_fallback_is_told_and_can_be_forbidden():
    options = {"spec": GistSpec(), "dtype": jnp.bfloat16, "head_dim": 64}
    chosen = choose(**options)
    assert chosen.name == "xla"
    assert "mosaic_gpu" in chosen.refused
    assert "no NVIDIA GPU" in str(chosen)
    assert str(choose("reference", **options)) == "reference"
    for wanted, more in (("mosaic_gpu", {}), (None, {"require_fused": True}), ("flash", {})):
        with pytest.raises(Refused):
            choose(wanted, **options, **more)
