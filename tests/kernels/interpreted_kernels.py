"""The Hopper kernels on a CPU, by Pallas' interpreter, against the float32 reference (run by test_mosaic_interpret).

The interpreter runs every warpgroup as a thread, fills memory with NaN before it is written, and fails on barriers
that are waited for in vain or passed unobserved, with a newer JAX also on races. It knows neither the matrix unit nor
its layouts.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import GistCache, GistSpec, gist_decode, init_gist_cache
from kernels_pallas.decode import seen_slots
from kernels_pallas.mosaic_gpu import gist_attention_mosaic_gpu, tiles
from kernels_pallas.mosaic_gpu.config import HALF, TILE, Config
from kernels_pallas.mosaic_gpu.decode import decode_mosaic_gpu
from kernels_pallas.mosaic_gpu.tiles import Stream
from kernels_pallas.reference import gist_attention_reference
from kernels_pallas.shapes import Problem
from tests.kernels import fast_interpret
from tests.kernels.test_gist_attention import jit, relative

fast_interpret.install()

CLOSE = 5e-3  # relative Frobenius error; bfloat16 inputs and probabilities give 2e-3 to 3e-3
SMALL = Config(key_tile=64, forward_stages=2, dq_stages=2, dkv_stages=2, longest=2)
GRADIENTS = {
    "grouped heads": (Problem(330, GistSpec(8, 256, 1, 2), heads=2, key_heads=1, head_dim=64), SMALL),
    "head size 128": (Problem(150, GistSpec(32, 32, 1, 2), heads=1, key_heads=1, head_dim=128), None),
    "blocks of 128": (Problem(270, GistSpec(128, 128, 1, 1), heads=1, key_heads=1, head_dim=64), None),
    "less than a block": (Problem(5, GistSpec(8, 16, 1, 2), heads=1, key_heads=1, head_dim=64), None),
}
FORWARD = {
    "less than the window": Problem(100, GistSpec(32, 256, 1, 2), heads=1, key_heads=1, head_dim=64),
    "no window, no middle": Problem(260, GistSpec(8, 0, 0, 3), batch=2, heads=1, key_heads=1, head_dim=64),
}


def _push(attend, q, k, v, do):
    """(outputs, dq, dk, dv)."""
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, scale=q[0].shape[-1] ** -0.5), q, k, v)
    return out, *pull(tuple(x.astype(o.dtype) for x, o in zip(do, out, strict=True)))


def both(problem: Problem, config: Config | None = None, segment_ids=None, arrays=None):
    """(outputs and gradients) of the kernels, and of the reference in float32."""
    arrays = problem.arrays(dtype=jnp.bfloat16) if arrays is None else arrays
    attend = partial(
        gist_attention_mosaic_gpu,
        spec=problem.spec,
        segment_ids=segment_ids,
        config=config,
        interpret=fast_interpret.interpreter(),
    )
    plain = partial(gist_attention_reference, spec=problem.spec, segment_ids=segment_ids)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    run = jit(partial(_push, attend))
    return run(*arrays), jit(partial(_push, plain))(*exact), run, arrays


def check(found, wanted) -> None:
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert all(x.dtype == jnp.bfloat16 for x in ours), what
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in ours), what
        assert relative(ours, theirs) < CLOSE, what
        for x, y in zip(ours, theirs, strict=True):
            assert np.linalg.norm(y) == 0 or relative([x], [y]) < 2 * CLOSE, what


@pytest.mark.parametrize("name", GRADIENTS)
def test_outputs_and_gradients_are_those_of_the_reference(name):
    problem, config = GRADIENTS[name]
    found, wanted, run, arrays = both(problem, config)
    check(found, wanted)
    if name == "grouped heads":  # which also has whole tiles, and key tiles whose visits are cut into items
        stream = Stream(problem.spec, problem.tokens, TILE)
        lists = tiles.query_lists(stream, TILE, config.key_tile)
        assert lists.visits(tiles.bounds(stream.ranges(), TILE), config.key_tile).full.sum() > 0
        assert tiles.key_lists(stream, HALF, TILE, True, config.longest).parts.shape[1] > 1
        again = run(*arrays)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            assert (np.asarray(x).view(np.uint16) == np.asarray(y).view(np.uint16)).all(), (
                "a second run differs"
            )


@pytest.mark.parametrize("name", FORWARD)
def test_outputs_at_the_edges(name):
    problem = FORWARD[name]
    q, k, v, _ = problem.arrays(dtype=jnp.bfloat16)
    scale = problem.head_dim**-0.5
    kernels = partial(gist_attention_mosaic_gpu, interpret=fast_interpret.interpreter())
    found = jit(lambda *x: kernels(*x, problem.spec, None, scale))(q, k, v)
    exact = (tuple(x.astype(jnp.float32) for x in xs) for xs in (q, k, v))
    wanted = jit(lambda *x: gist_attention_reference(*x, problem.spec, None, scale))(*exact)
    assert relative(found, wanted) < CLOSE


def test_packed_documents():
    """Two rows of a batch, packed differently."""
    problem = Problem(192, GistSpec(8, 64, 1, 2), batch=2, heads=1, key_heads=1, head_dim=64)
    ids_BT = jnp.asarray(np.stack([np.repeat([0, 1, 2], [64, 64, 64]), np.zeros(192)]), jnp.int32)
    found, wanted, *_ = both(problem, segment_ids=ids_BT)
    check(found, wanted)


def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient(monkeypatch):
    """No query of a `GistSpec` is blind, padding is: make some real rows blind by cutting their ranges."""
    from kernels_pallas.mosaic_gpu import call

    problem = Problem(140, GistSpec(8, 64, 1, 2), heads=1, key_heads=1, head_dim=64)
    blind = np.zeros(call.Stream(problem.spec, 140, 128).length, bool)
    places = call.Stream(problem.spec, 140, 128).places()
    blind[places[0][40:90]] = True
    blind[places[1][3]] = True
    whole = call.visible

    def cut(stream, segment_ids):
        return np.where(blind, 0, whole(stream, segment_ids)).astype(np.int32)

    monkeypatch.setattr(call, "visible", cut)
    q, k, v, do = problem.arrays(dtype=jnp.bfloat16)
    found, *_ = both(problem, arrays=(q, k, v, do))
    # the reference without these rows: their share of every gradient is that of a zero cotangent
    gone = (do[0].at[:, 40:90].set(0), do[1].at[:, 3].set(0), do[2])
    monkeypatch.undo()
    _, wanted, *_ = both(problem, arrays=(q, k, v, gone))
    out, dq, dk, dv = found
    for x in (out, dq):
        assert not np.asarray(x[0][:, 40:90], np.float32).any()
        assert not np.asarray(x[1][:, 3], np.float32).any()
    for ours, theirs in ((dk, wanted[2]), (dv, wanted[3])):
        assert relative(ours, theirs) < CLOSE


@pytest.mark.parametrize("tokens", [5, 300])
def test_gradients_are_taken_inside_shard_map(tokens):
    """What kernels return must vary over the mesh as what they were given does; nothing is run."""
    problem = Problem(tokens, GistSpec(), batch=2, heads=2, key_heads=1, head_dim=64)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec("data")

    def attend(q, k, v):
        return gist_attention_mosaic_gpu(q, k, v, problem.spec, None, 0.1)

    spread = jax.shard_map(attend, mesh=mesh, in_specs=part, out_specs=part)
    push = jax.grad(lambda *x: sum((o.astype(jnp.float32) ** 2).sum() for o in spread(*x)), (0, 1, 2))
    inputs = problem.arrays(dtype=jnp.bfloat16)[:3]
    found = jax.eval_shape(push, *inputs)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(inputs)]


DECODED = {
    "heads of 128, three to a key head": (GistSpec(8, 64, 1, 2), 3, 128, 400, (5, 399)),
    "fewer slots than a tile": (GistSpec(8, 0, 0, 2), 1, 64, 60, (0, 59)),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_is_that_of_plain_attention(name):
    """A sequence that has just begun, whose later parts nobody sees, beside one whose rings are full."""
    spec, group, head_dim, tokens, positions = DECODED[name]
    keys = jax.random.split(jax.random.key(0), 3)
    cache = init_gist_cache(spec, len(positions), tokens, 2, head_dim, jnp.bfloat16)
    k, v = (jax.random.normal(key, cache.k.shape, jnp.bfloat16) for key in keys[:2])
    q = jax.random.normal(keys[2], (len(positions), 2 * group, head_dim), jnp.bfloat16)
    cache = GistCache(k, v, cache.sizes)
    exact = GistCache(k.astype(jnp.float32), v.astype(jnp.float32), cache.sizes)
    position_B = jnp.asarray(positions)
    seen_BS = seen_slots(cache, position_B, spec)
    q_BKGD = q.reshape(len(positions), 2, group, head_dim)
    found = jit(partial(decode_mosaic_gpu, interpret=fast_interpret.interpreter()))(q_BKGD, k, v, seen_BS)
    wanted = gist_decode(q.astype(jnp.float32), exact, position_B, spec=spec)
    assert relative([found.reshape(wanted.shape)], [wanted]) < CLOSE
    blind = decode_mosaic_gpu(q_BKGD, k, v, jnp.zeros_like(seen_BS), interpret=fast_interpret.interpreter())
    assert not np.asarray(blind).any()
