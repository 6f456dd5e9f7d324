import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megacontext_jax import mesh as meshes
from megacontext_jax.config import Config, StageConfig, load_arch
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective
from megacontext_jax.train import optim
from megacontext_jax.train.plan import horizon, model_of, scaled
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import Schedules, lr_multiplier, schedules
from megacontext_jax.train.step import init_state, make_train_step
from tests.model.nanochat_weights import by_name, golden_model

ERAS = ("classic", "era2", "era3", "era3b", "era4", "latest")


def trained_as(arch: str, stage: str = "base") -> StageConfig:
    return getattr(load_arch(Config(), arch), stage)


@pytest.mark.parametrize("arch", ERAS)
def test_schedules_equal_nanochats(golden, arch):
    z = np.load(golden / f"nanochat/tables/schedules_{arch}.npz")
    n, opts = int(z["num_iterations"]), trained_as(arch)
    made = schedules(opts, RECIPES[opts.optimizer], n, first_stage=True)
    steps = np.arange(n)
    np.testing.assert_allclose(jax.vmap(made.rate)(steps), z["lrm"][:n], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(made.momentum)(steps), z["muon_momentum"][:n], atol=1e-6)
    if "muon_wd" in z and opts.weight_decay:
        decay = opts.weight_decay * jax.vmap(made.decay)(steps)
        np.testing.assert_allclose(decay, z["muon_wd"][:n], atol=1e-6)


@pytest.mark.parametrize("arch", ERAS)
def test_batch_horizon_rates_and_decay_follow_nanochat_by_depth(golden, arch):
    config = load_arch(Config(), arch)
    for row in json.loads((golden / f"nanochat/tables/scaling_{arch}.json").read_text()):
        config = replace(config, model=replace(config.model, arch=arch, depth=row["depth"]))
        derived, cfg = scaled(config, "base"), model_of(config)
        steps = horizon("base", config.base, cfg, None, derived.total_batch_size)
        assert derived.total_batch_size == row.get("total_batch_size", 524_288)
        assert steps == row["num_iterations"]
        assert derived.rate_scale == pytest.approx(row.get("lr_scale", 1.0), rel=1e-12)
        assert derived.weight_decay == pytest.approx(row.get("weight_decay_scaled", 0.0), rel=1e-12)


def test_warm_up_and_final_rate():
    multiplier = lr_multiplier(100, warmup=10, warmdown_ratio=0.5, final_lr_frac=0.1)
    assert float(multiplier(0)) == pytest.approx(0.1)
    assert float(multiplier(9)) == pytest.approx(1.0)
    assert float(multiplier(50)) == pytest.approx(1.0)
    assert float(multiplier(100)) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "optimizer"), [("classic_fp32", "muon"), ("head_fp32", "latest")])
def test_muon_and_adamw_equal_nanochats_over_six_steps(golden, name, optimizer):
    inputs, z = (np.load(golden / f"nanochat/optim/{n}.npz") for n in ("inputs", name))
    hyper, muon = json.loads(str(z["hyper_json"])), RECIPES[optimizer].muon
    lrm, momentum, decay = (jnp.asarray(inputs[k]) for k in ("lrm", "momentum", "head_muon_wd"))

    def scaled_by(rate):
        return optax.scale_by_learning_rate(lambda count: rate * lrm[count])

    def adamw(name):
        rows = hyper["adamw"]
        row = rows.get(name) or {
            "lr": rows[f"{name}_lr"],
            "betas": rows["betas"],
            "wd": rows["scal_wd"] if name == "scal" else 0.0,
        }
        return optax.chain(
            optax.scale_by_adam(*row["betas"], eps=rows["eps"]),
            optax.add_decayed_weights(row["wd"]),
            scaled_by(row["lr"]),
        )

    matrices = optim.scale_by_muon(muon, momentum=lambda t: momentum[t], decay=lambda t: decay[t])
    groups = {"muon": optax.chain(matrices, scaled_by(hyper["muon"]["lr"]))}
    groups |= {name: adamw(name) for name in ("emb", "head", "scal")}
    # wide, tall and square matrices as stacks of layers, as the model keeps them
    stacks = {"wide": ("wide0", "wide1"), "tall": ("tall0", "tall1"), "sq": ("sq0",)}
    labels = dict.fromkeys(stacks, "muon") | {name: name for name in ("emb", "head", "scal")}

    def tree(arrays, prefix):
        matrices = {
            name: np.stack([arrays[f"{prefix}:{m}"] for m in members]) for name, members in stacks.items()
        }
        return matrices | {name: arrays[f"{prefix}:{name}"] for name in ("emb", "head", "scal")}

    optimizer = optax.partition(groups, labels)
    params = jax.tree.map(jnp.asarray, tree(inputs, "p0"))
    state = optimizer.init(params)
    for t in range(hyper["steps"]):
        updates, state = jax.jit(optimizer.update)(tree(inputs, f"g{t}"), state, params)
        params = optax.apply_updates(params, updates)
        for name, wanted in tree(z, f"p{t + 1}").items():
            np.testing.assert_allclose(params[name], wanted, atol=3e-6, err_msg=f"{name} after step {t}")
    if muon.beta2:
        second = state.inner_states["muon"].inner_state[0].second
        for name in stacks:
            np.testing.assert_allclose(second[name], z[f"final_v:{name}"], rtol=1e-5)


STARTS = {
    "classic": "classic_gqa",
    "era2": "era2_jan11_lambdas_window",
    "era3": "era3_feb05_ve32_half_window",
    "era3b": "era3b_mar04_softcap20",
    "era4": "era4_mar09_ve12_qk115",
    "latest": "head_gqa_padvocab",
}


@pytest.mark.parametrize("arch", ERAS)
def test_five_training_steps_equal_nanochats(golden, arch):
    """Forward, backward, clipping, both optimisers and the whole compiled step, from PyTorch's weights."""
    cfg, params, _ = golden_model(golden / "nanochat" / STARTS[arch])
    z = np.load(golden / f"nanochat/train5/{arch}.npz")
    opts = replace(trained_as(arch), grad_clip=float(z["grad_clip"]))
    state, losses, norms = run_golden(cfg, params, opts, z)
    np.testing.assert_allclose(losses, z["losses"], rtol=1e-5)
    np.testing.assert_allclose(
        norms, z["grad_norms_preclip"], rtol=2e-5
    )  # the fifth of `latest` is at 1.3e-5
    final = by_name(cfg, state.params)
    for name, wanted in zip(z["param_names"], z["final_param_norms"], strict=True):
        # AdamW's first steps divide by |g|: rounding decides the sign where a gradient is tiny or its terms cancel;
        # PyTorch with the rows of a batch swapped differs from itself by as much
        tolerance = 1e-5 if ".h." in name else 1e-4
        assert np.linalg.norm(np.float64(final[name])) == pytest.approx(float(wanted), rel=tolerance), name
    for key in z.files:
        kind, _, name = key.partition(":")
        if name:
            rows = final[name][::32] if kind == "finalrows32" else final[name]
            tolerance = 2e-5 if ".h." in name else 2e-4
            np.testing.assert_allclose(rows, z[key], atol=tolerance, err_msg=name)


def run_golden(cfg, params, opts, z, first=0, opt_state=None):
    """Train on the golden batches from step `first`; (state, losses of all batches, gradient norms of the steps)."""
    lrm, momentum, decay = (jnp.asarray(z[k], jnp.float32) for k in ("lrm", "momentum", "muon_wd"))
    schedule = Schedules(lambda t: lrm[t], lambda t: momentum[t], lambda t: decay[t])
    muon_decays = RECIPES[opts.optimizer].decay_schedule != "constant"
    optimizer = optim.make_optimizer(
        opts, cfg, schedule, weight_decay=1.0 if muon_decays else opts.weight_decay
    )
    mesh = meshes.make_mesh()
    objective = make_objective(cfg, attention_impl="auto", dtype="float32")
    state = init_state(mesh, lambda key: jax.tree.map(jnp.asarray, params), optimizer, jax.random.key(0))
    if opt_state is not None:
        state = state._replace(opt_state=opt_state(state.opt_state), step=jnp.int32(first))
    step = make_train_step(objective.loss, optimizer, meshes.state_shardings(mesh, state), mesh, seed=0)
    losses, norms = [], []
    for tokens in z["batches"][first:].astype(np.int32):
        rows = tokens.reshape(1, -1, tokens.shape[-1])
        batch = {"inputs": rows[..., :-1], "targets": rows[..., 1:]}
        before = state.params
        if len(losses) == len(z["batches"]) - first - 1:  # the last batch is only looked at
            total, (weight, _) = objective.loss(before, {name: x[0] for name, x in batch.items()}, None)
            losses.append(float(total / weight))
            break
        state, metrics = step(state, {name: meshes.global_batch(mesh, x) for name, x in batch.items()})
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return state, losses, norms


def test_orthogonalised_updates_are_nearly_orthogonal():
    g_KRQ = jax.random.normal(jax.random.key(0), (3, 24, 40))
    singular = jnp.linalg.svd(optim.orthogonalise(g_KRQ), compute_uv=False)
    assert float(singular.max()) < 1.3
    assert float(singular.min()) > 0.4


def test_pocket_is_muon_whose_matrices_decay():
    cfg = GPTConfig("pocket", 16, 64, n_layer=2, n_head=1, n_kv_head=1, n_embd=16)
    params = make_objective(cfg, attention_impl="auto", dtype="float32").init(jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    updates = {}
    for name, decay in (("muon", 0.0), ("pocket", 0.3)):
        opts = StageConfig(optimizer=name, matrix_lr=0.02, weight_decay=decay)
        optimizer = optim.make_optimizer(opts, cfg, schedules(opts, RECIPES[name], 10, first_stage=True))
        first, state = optimizer.update(grads, optimizer.init(params), params)
        updates[name] = first, optimizer.update(grads, state, params)[0]
    for step, (plain, found) in enumerate(zip(*updates.values(), strict=True)):
        decay = 0.3 * (1 + np.cos(np.pi * step / 10)) / 2  # all of it at first, none at the end
        expected = plain | {
            "h": jax.tree.map(lambda u, w, d=decay: u - 0.02 * d * w, plain["h"], params["h"])
        }
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), found, expected)


def test_accumulated_micro_batches_equal_one_batch():
    """Also with unequal numbers of targets, which a mean of means would get wrong."""
    cfg = GPTConfig("pocket", 16, 64, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    objective = make_objective(cfg, attention_impl="auto", dtype="float32")
    opts = StageConfig(optimizer="adamw")
    optimizer = optim.make_optimizer(opts, cfg, schedules(opts, RECIPES["adamw"], 10, first_stage=True))
    mesh = meshes.make_mesh()
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 64, (2, 4, 16), np.int32)
    targets[0] = -1
    results = []
    for accumulation in (1, 2, 4):
        state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
        step = make_train_step(objective.loss, optimizer, meshes.state_shardings(mesh, state), mesh, seed=0)
        batch = {
            name: meshes.global_batch(mesh, rows.reshape(accumulation, -1, 16))
            for name, rows in (("inputs", inputs), ("targets", targets))
        }
        results.append(step(state, batch)[1])
    for other in results[1:]:
        for name in ("loss", "weight", "grad_norm"):
            assert float(other[name]) == pytest.approx(float(results[0][name]), rel=1e-5), name
