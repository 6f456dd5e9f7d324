"""Training with --mc through the real scripts: every stage, killed, continued, refused, judged and asked."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax import mesh as meshes
from megacontext_jax.cli import parse
from megacontext_jax.config import Config, MegaContextConfig, RunConfig, StageConfig
from megacontext_jax.context import setup
from megacontext_jax.errors import UserError
from megacontext_jax.infer.load import load_model
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import make_objective
from megacontext_jax.telemetry import names
from megacontext_jax.train import loop
from megacontext_jax.train.optim import make_optimizer
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules
from megacontext_jax.train.stages import context_parts, prepare
from megacontext_jax.train.step import init_state, make_train_step
from scripts import base_loss, base_train, chat_eval, import_nanochat, mc_otel_preflight, mid_train
from tests.collectors import serve_http
from tests.conftest import GOLDEN
from tests.context.test_objective import objective_of, tokens_of
from tests.infer.session_models import focus_chat
from tests.runs import ROOT, N, environment, flags, kill_when_saved, losses, records, run

ONE_LAYER = ("--depth", "1", "--aspect-ratio", "32")
MC = (
    *ONE_LAYER,
    *("--mc", "--block-size", "4", "--allocator-recent-tokens", "12", "--mc-horizon", "8"),
    *("--mc-train-wc-length", "25"),  # fewer would be gists throughout: nothing for the lens to compare
    *("--gistnet-layers", "1", "--lensnet-layers", "1"),
)
TOLD = ("--mc-log-timers", "--mc-train-report", "--mc-log-lod-ascii-val", "--mc-log-lod-ascii-train")
QUIET = (*MC, "--mc-raw-share", "0.25", "--mc-curriculum-share", "0")  # two phases
BASE = (*QUIET, *TOLD, "--mc-log-lens-debug")
SHORT = (*ONE_LAYER, "--num-iterations", "3", "--eval-every", "-1")
pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base run with --mc and, under the tag vanilla, a short one without."""
    folder = tmp_path_factory.mktemp("context")
    run(folder, "prepare_data")
    run(folder, "tok_train")
    with serve_http() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MC_OTEL_ENDPOINT", collector.endpoint)
        (folder / "said.txt").write_text(run(folder, "base_train", *BASE))
        run(folder, "base_train", "--tag", "vanilla", *SHORT)
        assert not mc_otel_preflight.main([])
    spans = [(span.name, [a.key.removeprefix("mc.") for a in span.attributes]) for span in collector.spans()]
    (folder / "spans.json").write_text(json.dumps(spans))
    return folder


@pytest.fixture(scope="module")
def retrofitted(trained):
    """What mid_train said that began GistNet and LensNet on the vanilla base and froze that."""
    frozen = ("--mc-freeze-base", "--weight-decay", "0.1")  # which alone would move what has no gradient
    return run(trained, "mid_train", *MC, *frozen, "--tag", "vanilla", *SHORT)


@pytest.fixture
def here(trained, monkeypatch):
    """The folders of the trained runs for this process."""
    for name, value in environment(trained).items():
        monkeypatch.setenv(name, value)
    return trained


def test_a_run_logs_what_its_working_contexts_do(trained):
    said = (trained / "said.txt").read_text()
    assert "nats above the raw context" in said
    assert said.count("Compiled the training step") == 2
    strips = re.findall(r"(?:before focus|after|in training) ([.─═⊙]+)$", said, re.MULTILINE)
    tokens = {len(strip) * 4 for strip in strips}
    assert len(strips) == 3 + 3 + 2, said  # at three validations; the first phase is raw
    assert tokens == {64, 56}  # a row, and the history before the horizon
    assert all("─" in strip and strip.endswith("⊙⊙⊙") for strip in strips)
    assert len(re.findall(r"scores of gists \(level:node\): [12]:\d+ [+-]\d\.\d\d", said)) == 3
    assert re.search(r"working contexts: .*delta_nll_h8 -?\d.*lens_loss \d", said)
    found = records(trained, "megacontext_base_d1")
    own = {name for record in found for name in record if name.startswith(("mc/", "val/delta"))}
    assert {name for name in own if not names.is_known(name)} == set()
    assert own >= {
        *("mc/lens_loss", "mc/delta_nll_h8", "mc/gist_regression_loss", "mc/preference_agreement"),
        *("mc/lod_loss/0", "mc/lod_count/2", "mc/swap_rate", "mc/utilization", "mc/residency_p95"),
        *("mc/build_ms", "mc/lens_forward_ms", "mc/focus_ms", "mc/base_forward_ms", "mc/positional_ms"),
        *(f"val/delta_nll_h8/{view}{p}" for view in ("sliding", "gist", "learned") for p in ("", "_p95")),
    }
    judged = [record["step"] for record in found if "val/delta_nll_h8/learned" in record]
    assert judged == [0, 6, 12]
    assert all(0 < record["mc/utilization"] <= 1 for record in found if "mc/utilization" in record)
    # working contexts from step 3 on
    assert [r["step"] for r in found if "mc/lens_loss" in r] == list(range(3, N))


def test_every_metric_that_is_sent_is_listed_and_every_listed_one_is_sent(trained):
    ours, vanilla = (records(trained, f"megacontext_base_{tag}") for tag in ("d1", "vanilla"))
    sent = {name for record in ours + vanilla for name in record if name != "time"}
    assert {name for name in sent if not names.is_known(name)} == set()
    # no share of a CPU's peak, which is unknown
    assert set(names.METRICS) - {names.template(name) for name in sent} == {"train/mfu"}
    assert not [name for record in vanilla for name in record if name.startswith("mc/")]


def test_every_event_that_is_sent_is_listed_and_every_listed_one_is_sent(trained):
    """In training, by the preflight, and by a model that answers from a working context."""
    spans = json.loads((trained / "spans.json").read_text())
    chat = replace(
        focus_chat(lens="learned"), event=lambda kind, fields, session_id: spans.append((kind, fields))
    )
    with chat.new_session() as session:
        session.append(np.arange(100, dtype=np.uint32))
        list(session.answer(max_tokens=10, temperature=0.0))
    own = {"session_id", "event_type"}
    sent = {
        (kind, re.sub(r"(?<=lod_)\d+", "{l}", name))
        for kind, fields in spans
        for name in fields
        if name not in own
    }
    assert sent == {(kind, name) for kind, fields in names.SPANS.items() for name in fields}


def test_what_the_records_count_adds_up(trained):
    found = records(trained, "megacontext_base_d1")
    steps = [r for r in found if "train/loss" in r]
    assert {r["train/tokens_per_step"] for r in steps} == {256}
    assert {r["train/grad_accum_steps"] for r in steps} == {2}
    assert {(r["step"] >= 3, r.get("mc/grad_accum_steps")) for r in steps} == {(False, None), (True, 2)}
    assert all(0 <= r["time/dataloader_ms"] < 1e3 * 300 for r in steps)
    for r in (r for r in steps if "mc/preference_corr_mean" in r):
        assert (
            -1.001
            < r["mc/preference_corr_min"]
            <= r["mc/preference_corr_mean"]
            <= r["mc/preference_corr_max"]
            < 1.001
        )
    judged = [r for r in found if "mc/runtime_tokens" in r]
    rows = {r["mc/runtime_tokens"] / 64 for r in judged}
    assert rows == {16}  # eval_tokens
    for r in judged:
        assert r["mc/runtime_original_tokens"] == 16 * 56
        assert r["mc/runtime_wc_tokens"] == pytest.approx(16 * 25 * r["mc/utilization"])
        assert r["mc/runtime_refocus_updates"] == 16 * 2
        assert r["mc/time_controller_ms"] == pytest.approx(
            sum(r[f"mc/{name}_ms"] for name in ("build", "variant", "positional", "lens_forward"))
        )


def test_tokens_are_counted_as_in_a_vanilla_run(trained):
    ours, vanilla = (
        {r["step"]: r["total_training_tokens"] for r in records(trained, run) if "train/loss_step" in r}
        for run in ("megacontext_base_d1", "megacontext_base_vanilla")
    )
    assert {step: ours[step] for step in vanilla} == vanilla
    assert ours[N - 1] == N * 256


def test_a_killed_run_continues_to_the_same_losses(trained, tmp_path):
    """Saved in the first phase, killed in it or in the second."""
    shutil.copytree(trained / "base", tmp_path / "base", symlinks=True)
    kill_when_saved(tmp_path, "megacontext_base_d1", 3, "base_train", *QUIET)
    assert "Continuing megacontext_base_d1 at step" in run(tmp_path, "base_train", *QUIET)
    assert losses(tmp_path, "megacontext_base_d1") == losses(trained, "megacontext_base_d1")
    assert sorted(losses(trained, "megacontext_base_d1")) == list(range(N))


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (ONE_LAYER, "mc"),
        ((*BASE, "--block-size", "8"), "block_size"),
        ((*BASE, "--mc-num-random-variants", "3"), "mc_num_random_variants"),
    ],
)
def test_another_megacontext_is_refused_by_name(here, words, setting):
    with pytest.raises(UserError, match=rf"\b{setting}\b") as error:
        base_train.main(flags(*words))
    assert "\n" not in str(error.value)


def test_a_vanilla_base_gets_gists_in_a_later_stage_and_may_stay_as_it_is(here, retrofitted):
    assert "megacontext_base_vanilla has no GistNet and LensNet; they begin here." in retrofitted
    mid_words = ("--tag", "vanilla", "-i", "mid", *MC)
    base, mid = (
        load_model(parse(flags(*words), doc="")) for words in (("--tag", "vanilla", "-i", "base"), mid_words)
    )
    for name, before in base.params.items():
        jax.tree.map(np.testing.assert_array_equal, mid.params[name], before)
    fresh = setup.context_config(MegaContextConfig(block_size=4, gistnet_layers=1, lensnet_layers=1), mid.cfg)
    assert mid.context.context == fresh
    begun = {"gistnet", "lensnet"}
    assert begun == set(mid.params) - set(base.params)
    assert np.abs(mid.params["gistnet"]["head"]["out"]["weight"]).max() > 0  # zero at its start


def test_the_last_stage_goes_on_with_the_gists_of_the_one_before_and_is_asked(trained, retrofitted):
    said = run(trained, "chat_sft", *MC, "--tag", "vanilla", *SHORT)
    assert "they begin here" not in said
    assert "mc/delta_nll_h8" in json.dumps(records(trained, "megacontext_sft_vanilla"))
    asked = run(
        trained, "chat_eval", *MC, "-i", "sft", "--tag", "vanilla", "--num-examples", "2", "-a", "facts"
    )
    assert "accuracy" in asked


def test_a_model_of_nanochat_gets_gists_frozen_or_not(here, tmp_path):
    import_nanochat.main([str(GOLDEN / "pipeline_head/base_dir"), "--as", "theirs"])
    words = (
        *MC,
        *SHORT,
        "--tag",
        "theirs",
        "--num-iterations",
        "2",
        "--optimizer",
        "adamw",
        "--mc-disable-val",
    )
    said = run(here, "mid_train", *words, "--mc-freeze-base")
    assert "megacontext_base_theirs has no GistNet and LensNet; they begin here." in said
    said = run(here, "chat_sft", *words)
    assert "begin here" not in said
    base, mid, sft = (
        load_model(parse(flags("--tag", "theirs", "-i", stage, *wanted), doc="")).params
        for stage, wanted in (("base", ()), ("mid", MC), ("sft", MC))
    )
    same = jax.tree.map(np.array_equal, base, {name: mid[name] for name in base})
    assert all(jax.tree.leaves(same))
    assert np.abs(mid["gistnet"]["head"]["out"]["weight"]).max() > 0  # zero at its start
    for name in ("h", "gistnet"):
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), mid[name], sft[name])
        assert any(jax.tree.leaves(moved)), name


def test_a_stage_without_mc_leaves_the_gists_of_its_base_out(trained):
    said = run(trained, "mid_train", *SHORT)
    assert "megacontext_base_d1 has GistNet and LensNet; without --mc this stage leaves them out." in said
    assert (trained / "artifacts/megacontext_mid_d1/000003").is_dir()


def test_parts_of_a_checkpoint_keep_their_shape_and_the_record_says_which(here):
    words = (*SHORT, "--mc", "--allocator-recent-tokens", "12", "--mc-horizon", "8")
    own = {"block_size": 4, "mc_levels": 2, "gistnet_layers": 1, "lensnet_layers": 1}
    config = parse(flags(*words), doc="", stage="mid")
    assert (config.mc.block_size, config.mc.gistnet_layers) == (32, 2)  # what new ones would have
    found = prepare(config, "mid")
    for record in (found.identity["mc"], found.config.to_dict()["mc"]):
        assert own.items() <= record.items()
    assert found.phases[-1].objective.context.block == 4
    assert load_model(parse(flags(*words, "-i", "base"), doc="")).context.context.block == 4


@pytest.mark.parametrize(
    ("flag", "value", "own"),
    [
        ("--block-size", "8", "4"),
        ("--mc-levels", "1", "2"),
        ("--gistnet-type", "mean", "transformer"),
        ("--gistnet-layers", "2", "1"),
        ("--gistnet-pooling", "cls", "mean"),
        ("--gistnet-head", "linear", "mlp"),
        ("--lensnet-layers", "2", "1"),
        ("--lensnet-head", "linear", "mlp"),
        ("--positional-type", "rank", "gaussian"),
    ],
)
def test_a_shape_that_a_checkpoint_does_not_have_is_refused(here, flag, value, own):
    for script in (mid_train, base_loss):
        with pytest.raises(UserError) as error:
            script.main(flags(*MC, *SHORT, "-i", "base", flag, value))
        for words in (f"{flag} {value} does not fit megacontext_base_d1", f"{flag} {own};"):
            assert words in str(error.value)
    # without gists the flag says nothing
    config = parse(flags("-i", "base", flag, value), doc="")
    assert setup.keep_saved(config, {"model_config": {}}, "any") is config


def test_base_loss_says_what_every_lens_costs(trained):
    said = run(trained, "base_loss", *MC, "-i", "base", "--context-rows", "8")
    for view in ("sliding", "gist", "learned", "attention", "lexical", "random"):
        assert f"{view} +" in said or f"{view} -" in said
    report = json.loads((trained / "artifacts/report/base-model-loss.json").read_text())
    assert "val nats above the raw context, lexical" in json.dumps(report)


def test_working_contexts_of_a_vanilla_model_are_refused(here):
    with pytest.raises(UserError, match="trained without --mc") as error:
        chat_eval.main(flags(*MC, "-i", "base", "--tag", "vanilla"))
    assert "\n" not in str(error.value)


# --- Phases ---------------------------------------------------------------------------------------------


def objective_and_parts(opts: MegaContextConfig):
    cfg = GPTConfig("pocket", 64, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    base = make_objective(cfg, attention_impl="auto", dtype="float32")
    return base, setup.context_config(opts, cfg)


def test_the_curriculum_begins_raw_and_shrinks():
    opts = MegaContextConfig(block_size=4, allocator_recent_tokens=12)
    found = setup.phases(opts, *objective_and_parts(opts), 1000, shrink=True)
    steps, widths = [p.first_step for p in found], [p.objective.width for p in found[1:]]
    assert found[0].objective.mixture.variants == 0
    assert steps == [0, 100, 150, 200, 250, 300]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 49  # the widest reachable within 80 % of 64
    assert widths[-1] == 16
    assert all(p.objective.mixture.variants == 2 for p in found[1:])
    later = setup.phases(opts, *objective_and_parts(opts), 1000, shrink=False)
    assert [(p.first_step, p.objective.width) for p in later] == [(0, 16)]
    at = SimpleNamespace(phases=found)
    assert [loop.phase_at(at, step).first_step for step in (0, 99, 100, 299, 5000)] == [0, 0, 100, 250, 300]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, ""),
        ({"mc_num_random_variants": 1}, "--mc-num-random-variants 1 trains no LensNet"),
        ({"mc_train_wc_length": 64}, "only one way to lay a row out"),
        ({"positional_type": "gaussian_alibi"}, "chat_eval, chat_cli and chat_web refuse such a model"),
    ],
)
def test_what_a_stage_cannot_learn_or_do_is_said_before_it(options, sentence, capsys):
    opts = MegaContextConfig(
        **{"block_size": 4, "allocator_recent_tokens": 12, "mc_train_wc_length": 25} | options
    )
    base, _ = objective_and_parts(opts)
    config = Config(mc=opts, run=RunConfig(mc=True))
    assert context_parts(config, base.cfg, None, "") == setup.context_config(opts, base.cfg)
    said = capsys.readouterr().out
    assert said.count("Note: ") == bool(sentence)
    assert sentence in said


def test_a_budget_is_the_evaluations_own_or_the_allocators():
    assert setup.asked_budget(MegaContextConfig()) is None
    assert setup.asked_budget(MegaContextConfig(allocator_soft_max=30)) == 30
    both = MegaContextConfig(mc_eval_soft_max_length=20, allocator_soft_max=30)
    assert setup.asked_budget(both) == 20


def test_a_short_history_may_need_more_entries_than_a_row():
    opts = MegaContextConfig(block_size=4, allocator_recent_tokens=12)
    _, parts = objective_and_parts(opts)
    assert setup.budget(opts, parts, 64) == 16
    assert (
        setup.budget(opts, parts, 64, 56) == 17
    )  # 44 tokens before the tail: 2 upper gists and 3 of 4 tokens
    assert setup.budget(replace(opts, allocator_soft_max=30), parts, 64, 56) == 30
    assert setup.budget(replace(opts, allocator_soft_max=2048), parts, 64, 56) == 2048
    with pytest.raises(UserError, match="16 entries"):
        setup.budget(replace(opts, allocator_soft_max=16), parts, 64, 56)


# --- Micro-batches --------------------------------------------------------------------------------------


class Step(dict):
    """A compiled step that needs a byte for every row."""

    def lower(self, state, batch):
        return SimpleNamespace(compile=lambda: batch["inputs"].shape[1])


@pytest.fixture
def on_a_small_device(monkeypatch):
    def fit(memory: float, **mc) -> tuple[int, int]:
        """(rows of a micro-batch, micro-batches) of 8 rows on a device of so many bytes."""
        monkeypatch.setattr(loop.hardware, "memory_bytes", lambda: memory)
        monkeypatch.setattr(loop.hardware, "compiled_memory", lambda rows: rows)
        monkeypatch.setattr(loop, "make_train_step", lambda *args, **options: Step())
        config = Config(mc=MegaContextConfig(**mc))
        mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
        setup_ = SimpleNamespace(config=config, mesh=mesh, accumulation=1, optimizer=None)
        phase = loop.Phase(0, SimpleNamespace(loss=None, summarise=None))
        rows = {name: jnp.zeros((8, 4), jnp.int32) for name in ("inputs", "targets")}
        _, batch = loop.compile_step(setup_, phase, None, rows, None)
        assert batch["inputs"].shape == batch["targets"].shape
        assert batch["inputs"].shape[0] == setup_.accumulation
        return batch["inputs"].shape[1], setup_.accumulation

    return fit


def test_micro_batches_halve_until_they_fit(on_a_small_device, capsys):
    assert on_a_small_device(10.0) == (8, 1)
    assert "more than" not in capsys.readouterr().out
    assert on_a_small_device(5.0) == (4, 2)
    assert on_a_small_device(2.6) == (2, 4)
    assert capsys.readouterr().out.count("micro-batches of 4 rows") == 2
    assert on_a_small_device(5.0, mc_auto_batch_safety=2.0) == (2, 4)
    assert on_a_small_device(5.0, mc_auto_batch=False) == (8, 1)


def test_one_row_that_does_not_fit_is_one_sentence(on_a_small_device):
    with pytest.raises(UserError, match="One row per device") as error:
        on_a_small_device(1.2)
    assert "--remat full" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_whose_micro_batches_were_halved_continues_with_these(here, monkeypatch, capsys):
    """The first phase does not fit the device, the later one would."""
    words = ("--tag", "halved", *QUIET, "--num-iterations", "4", "--save-every", "2", "--eval-every", "-1")
    words = flags(*words, "--mc-disable-val")
    needed = iter([math.inf])
    monkeypatch.setattr(loop.hardware, "compiled_memory", lambda compiled: next(needed, 0))
    assert not base_train.main(words)
    assert capsys.readouterr().out.count("1 rows in 4 micro-batch(es)") == 2  # in either phase
    curve = losses(here, "megacontext_base_halved")
    shutil.rmtree(here / "artifacts/megacontext_base_halved/000004")
    assert not base_train.main(words)
    assert "Continuing megacontext_base_halved at step 2" in capsys.readouterr().out
    assert losses(here, "megacontext_base_halved") == curve


def test_other_flags_deal_the_rows_out_anew():
    mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    saved = {"asked": {"accumulation": 2, "shards": 1}, "accumulation": 8}
    for accumulation, state, wanted in ((2, saved, 8), (1, saved, 1), (2, {}, 2)):
        setup_ = SimpleNamespace(mesh=mesh, accumulation=accumulation)
        loop.resume_micro_batches(setup_, {"micro_batches": state} if state else {})
        assert setup_.accumulation == wanted
    saved["asked"]["shards"] = 8
    setup_ = SimpleNamespace(mesh=mesh, accumulation=2)
    loop.resume_micro_batches(setup_, {"micro_batches": saved})
    assert setup_.accumulation == 2


# --- Meshes ---------------------------------------------------------------------------------------------


def curve(*axes: int) -> list[list[float]]:
    """Losses and what the metrics say in four steps on a mesh of all devices."""
    mesh = meshes.make_mesh(*axes)
    objective = objective_of(layers=1)
    objective = replace(objective, base=replace(objective.base, mesh=mesh))
    # constant small rates: Adam's first steps divide by |g| and would amplify rounding
    rates = {"matrix_lr": 2e-3, "embedding_lr": 2e-3, "unembedding_lr": 2e-3, "context_lr": 2e-3}
    opts = StageConfig(optimizer="adamw", **rates)
    schedule = schedules(opts, RECIPES["adamw"], 100, first_stage=True)
    optimizer = make_optimizer(opts, objective.cfg, schedule, context=True)
    state = init_state(mesh, objective.init, optimizer, jax.random.key(0))
    step = make_train_step(
        objective.loss,
        optimizer,
        meshes.state_shardings(mesh, state),
        mesh,
        seed=0,
        summarise=objective.summarise,
    )
    found = []
    for i in range(4):
        rows = {name: meshes.global_batch(mesh, x[None]) for name, x in tokens_of(8, seed=i % 2).items()}
        state, metrics = step(state, rows)
        jax.block_until_ready(metrics)  # simulated devices deadlock on queued collectives
        found.append(
            [float(metrics[name]) for name in ("loss", "grad_norm", "mc/lens_loss", "mc/delta_nll_h4")]
        )
    return found


def test_eight_devices_give_the_single_device_curve():
    runs = []
    for devices, axes in ((1, (1, 1, 1)), (8, (2, 2, 2))):
        code = f"import json; from {__name__} import curve; print(json.dumps(curve{axes}))"
        simulated = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | simulated,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(np.array(json.loads(done.stdout.splitlines()[-1])))
    one, eight = runs
    assert one[-1, 0] < one[1, 0]
    np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=1e-3, atol=1e-5)
