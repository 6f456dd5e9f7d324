"""bfloat16 activations stay near float32; what is trained stays float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax import mesh as meshes
from megacontext_jax.config import StageConfig
from megacontext_jax.model import decode, gpt
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective
from megacontext_jax.train import optim
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules
from megacontext_jax.train.step import init_state, make_train_step

CFG = GPTConfig("pocket", sequence_len=32, vocab_size=256, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)
HALF = jnp.bfloat16


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is zero, so that every tensor has a gradient."""
    params = gpt.init_params(CFG, jax.random.key(0))
    for i, (name, group) in enumerate(
        [("attn_proj", params["h"]), ("mlp_proj", params["h"]), ("lm_head", params), ("smear_gate", params)]
    ):
        group[name] = jax.random.normal(jax.random.key(10 + i), group[name].shape) / 8
    return params


@pytest.fixture(scope="module")
def batch():
    ids = jax.random.randint(jax.random.key(1), (4, 33), 0, CFG.vocab_size)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:].at[0, :8].set(-1)}


@pytest.fixture(scope="module")
def full(params, batch):
    return outcome("float32", params, batch)


def outcome(dtype, params, batch):
    """Hidden states, mean loss and gradients."""
    objective = make_objective(CFG, attention_impl="auto", dtype=dtype)

    def mean(params):
        total, (weight, _) = objective.loss(params, batch, None)
        return total / weight

    return jax.jit(lambda p: (objective.hidden(p, batch["inputs"]), *jax.value_and_grad(mean)(p)))(params)


def distance(a, b) -> float:
    """Norm of the difference relative to the norm of b."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine(a, b) -> float:
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_forward_loss_and_gradients_stay_near_float32(params, batch, full):
    hidden, loss, grads = outcome(HALF, params, batch)
    assert hidden.dtype == HALF
    assert 0 < distance(hidden, full[0]) < 3e-2  # 0 would mean that nothing was computed in bfloat16
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(full[1]), abs=1e-2)
    wanted = dict(jax.tree.leaves_with_path(full[2]))
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert gradient.dtype == jnp.float32
        assert cosine(gradient, wanted[path]) > 0.99, jax.tree_util.keystr(path)
        assert distance(gradient, wanted[path]) < 0.1, jax.tree_util.keystr(path)


def test_logits_stay_near_float32(params, batch):
    wanted, logits = (
        jax.jit(partial(gpt.forward, cfg=CFG, dtype=dtype))(params, ids_BT=batch["inputs"])
        for dtype in (jnp.float32, HALF)
    )
    assert logits.dtype == jnp.float32
    assert 0 < distance(logits, wanted) < 3e-2


@pytest.mark.parametrize("recipe", ["muon", "era2", "latest"])
def test_muon_in_bfloat16_stays_near_float32(params, recipe):
    keys = jax.random.split(jax.random.key(2), len(params["h"]))
    # gradients of few directions, as real ones are: where the orthogonalisation has most to do
    grads = {
        name: jnp.einsum(
            "lor,lri->loi",
            jax.random.normal(key, (*w.shape[:2], 8)),
            jax.random.normal(jax.random.fold_in(key, 1), (w.shape[0], 8, w.shape[2])),
        )
        + 0.3 * jax.random.normal(jax.random.fold_in(key, 2), w.shape)
        for key, (name, w) in zip(keys, params["h"].items(), strict=True)
    }
    updates = {}
    for dtype in (jnp.float32, HALF):
        muon = optim.scale_by_muon(
            RECIPES[recipe].muon, momentum=lambda t: 0.9, decay=lambda t: 0.1, dtype=jnp.dtype(dtype)
        )
        updates[dtype], state = jax.jit(muon.update)(grads, muon.init(params["h"]), params["h"])
        arrays = jax.tree.leaves((updates[dtype], state._replace(count=())))
        assert {x.dtype for x in arrays} == {jnp.dtype("float32")}
    for name, wanted in updates[jnp.float32].items():
        assert 0 < distance(updates[HALF][name], wanted) < 0.15, name
        assert cosine(updates[HALF][name], wanted) > 0.99, name


def test_decoding_in_bfloat16_follows_the_full_forward_in_bfloat16(params, batch):
    ids = np.asarray(batch["inputs"][:2])
    full_BTV = jax.jit(partial(gpt.forward, cfg=CFG, dtype=HALF))(params, ids_BT=ids)
    unstacked = decode.unstack_layers(params)
    rows, length_B = np.arange(2), np.array([3, 9])
    cache = decode.init_cache(CFG, 2, CFG.sequence_len, HALF)
    step = jax.jit(lambda ids, cache: decode.decode_step(unstacked, CFG, ids, cache, dtype=HALF))
    prefill = jax.jit(lambda *args: decode.prefill(unstacked, CFG, *args, dtype=HALF))
    logits_BV, cache = prefill(ids[:, :10], jnp.array(length_B), cache)
    for t in range(20):
        at = length_B + t
        assert distance(logits_BV, full_BTV[rows, at - 1]) < 3e-2, t
        logits_BV, cache = step(ids[rows, at], cache)
        assert logits_BV.dtype == jnp.float32
    assert {x.dtype for x in (*cache.k, *cache.v, cache.previous_B1C)} == {jnp.dtype(HALF)}


def test_parameters_and_optimiser_state_stay_float32(batch):
    mesh = meshes.make_mesh()
    opts = StageConfig(matrix_lr=0.01, embedding_lr=0.01, unembedding_lr=0.002)
    losses = {}
    for dtype, accumulation in (("float32", 1), ("bfloat16", 2)):
        objective = make_objective(CFG, attention_impl="auto", dtype=dtype)
        schedule = schedules(opts, RECIPES[opts.optimizer], 10, first_stage=True)
        optimizer = optim.make_optimizer(opts, CFG, schedule, ns_dtype=jnp.dtype(dtype))
        state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
        types = jax.tree.map(lambda x: x.dtype, state)
        step = make_train_step(objective.loss, optimizer, meshes.state_shardings(mesh, state), mesh, seed=0)
        placed = {
            name: meshes.global_batch(mesh, np.asarray(x).reshape(accumulation, -1, x.shape[-1]))
            for name, x in batch.items()
        }
        losses[dtype] = []
        for _ in range(5):
            state, metrics = step(state, placed)
            assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
            losses[dtype].append(float(metrics["loss"]))
        assert jax.tree.map(lambda x: x.dtype, state) == types
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        kinds = {x.dtype for x in jax.tree.leaves(state.opt_state)}
        assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}  # moments and counters
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"][-1] < losses["bfloat16"][0]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], atol=2e-2)
