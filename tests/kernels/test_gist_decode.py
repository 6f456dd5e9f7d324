"""One row at a time gives what whole sequences give, from rings that forget nothing that is still seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu_checks import decoded_rows
from kernels_pallas import GistSpec, Refused, api, gist_attention, gist_decode
from kernels_pallas.decode import fill, init_gist_cache, slots
from kernels_pallas.shapes import Problem

SPECS = [GistSpec(4, 16, 1, 3), GistSpec(2, 6, 0, 4), GistSpec(8, 0, 2, 1), GistSpec(3, 9, 1, 2)]
SPECS.append(GistSpec(4, 16, 1, 1).deeper(4, 150))


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_seen_is_still_there(spec):
    t = np.arange(3000)
    for level in range(spec.levels + 1):
        end = t[(t + 1) % spec.block**level == 0]
        ranges = spec.key_ranges(level, (end + 1) // spec.block**level - 1)
        for m, (first, stop) in enumerate(ranges):
            existing = (end + (m <= level)) // spec.block**m
            assert (stop <= existing).all()  # nothing is seen before it is appended
            assert (existing - first).max() <= slots(spec, 3000)[m]
    longer = slots(spec, 30_000)
    assert longer[:-1] == slots(spec, 300_000)[:-1]


@pytest.mark.parametrize(
    ("spec", "tokens"), [(SPECS[0], 5000), (SPECS[1], 300), (SPECS[2], 400), (SPECS[3], 250)]
)
def test_token_by_token_is_the_whole_sequence(spec, tokens):
    problem = Problem(tokens, spec, batch=2, heads=4, key_heads=2, head_dim=8)
    q, k, v, _ = problem.arrays()
    whole = jax.jit(partial(gist_attention, spec=spec))(q, k, v)
    cache = init_gist_cache(spec, 2, tokens, 2, 8)
    found = jax.jit(partial(decoded_rows, spec, count=tokens))(cache, (q, k, v), jnp.zeros(2, jnp.int32))
    for level, o_TBHD in enumerate(found):
        ended = o_TBHD[spec.block**level - 1 :: spec.block**level].swapaxes(0, 1)
        np.testing.assert_allclose(ended, whole[level], atol=1e-5)


def test_sequences_of_different_lengths_go_on_after_a_prefill():
    spec, tokens, more = SPECS[0], 200, 60
    problem = Problem(tokens, spec, batch=3, heads=4, key_heads=2, head_dim=8)
    q, k, v, _ = problem.arrays()
    whole = gist_attention(q, k, v, spec=spec)
    length_B = jnp.array([3, 64, 137])
    padded = [tuple(x.at[:, 137 // spec.block**m :].set(9.0) for m, x in enumerate(rows)) for rows in (k, v)]
    cache = fill(init_gist_cache(spec, 3, tokens, 2, 8), *padded, length_B, spec)
    found = jax.jit(partial(decoded_rows, spec, count=more))(cache, (q, k, v), length_B)[0]
    for b, n in enumerate(length_B):
        np.testing.assert_allclose(found[:, b], whole[0][b, n : n + more], atol=1e-5)


def test_a_cache_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 tokens"):
        slots(SPECS[0], 0)


def test_an_implementation_that_cannot_run_is_refused():
    cache = init_gist_cache(SPECS[0], 1, 50, 2, 64, jnp.bfloat16)
    ask = partial(
        gist_decode, jnp.zeros((1, 2, 64), jnp.bfloat16), cache, jnp.zeros(1, jnp.int32), spec=SPECS[0]
    )
    with pytest.raises(Refused, match="no Hopper GPU"):
        ask(implementation="mosaic_gpu")
    with pytest.raises(Refused, match="choose from xla, mosaic_gpu"):
        ask(implementation="reference")


def test_the_kernel_takes_no_float32_queries_on_a_bfloat16_cache(monkeypatch):
    """Plain attention takes them."""
    cache = init_gist_cache(SPECS[0], 1, 50, 2, 64, jnp.bfloat16)
    q_BHD, position_B = jnp.ones((1, 2, 64)), jnp.zeros(1, jnp.int32)
    assert gist_decode(q_BHD, cache, position_B, spec=SPECS[0]).dtype == jnp.float32
    monkeypatch.setattr(api, "_capability", lambda: "9.0")
    with pytest.raises(Refused, match="float32 only as TF32"):
        gist_decode(q_BHD, cache, position_B, spec=SPECS[0], implementation="mosaic_gpu")


def test_layers_of_equal_shapes_share_a_kernel():
    from kernels_pallas.mosaic_gpu.decode import decode_mosaic_gpu

    q_BKGD, k_BKSD = (jax.ShapeDtypeStruct((2, 2, n, 64), jnp.bfloat16) for n in (3, 80))
    seen_BS = jax.ShapeDtypeStruct((2, 80), jnp.bool_)
    layers = jax.make_jaxpr(lambda *x: (decode_mosaic_gpu(*x), decode_mosaic_gpu(*x)))
    traced = layers(q_BKGD, k_BKSD, k_BKSD, seen_BS)
    first, second = (e.params["jaxpr"] for e in traced.eqns if e.params.get("name") == "decode_mosaic_gpu")
    assert first is second
