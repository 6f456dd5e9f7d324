"""Saving and restoring: exactness, damage, disks, settings that do not fit."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from megacontext_jax.checkpoints import digest, writer
from megacontext_jax.checkpoints.restore import check_compatible, load_params, read_meta, restore
from megacontext_jax.checkpoints.runs import find_run
from megacontext_jax.checkpoints.writer import Checkpoints
from megacontext_jax.errors import UserError

ADAM = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
MOMENTUM = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True))
OPTIMIZER = optax.partition(
    {"adam": ADAM, "momentum": MOMENTUM}, {"wte": "adam", "h": "momentum", "n": "adam"}
)


def make_state(seed: int = 0):
    """Parameters in several types and an optimiser state of nested NamedTuples, none of it trivial."""
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    params = {
        "wte": jax.random.normal(next(keys), (32, 8)),
        "h": {"c_q": jax.random.normal(next(keys), (3, 8, 8), jnp.bfloat16), "scale": jnp.float32(0.1)},
        "n": jnp.arange(5, dtype=jnp.int32) + seed,
    }

    def fill(x):
        return (
            jax.random.uniform(next(keys), x.shape).astype(x.dtype)
            if x.ndim
            else x + jnp.asarray(seed, x.dtype)
        )

    return params, jax.tree.map(fill, OPTIMIZER.init(params))


def struct(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(checkpoints: Checkpoints, *saved_steps: int, meta: dict | None = None):
    for step in saved_steps:
        params, opt_state = make_state(step)
        checkpoints.save(
            step,
            params=params,
            opt_state=opt_state,
            data_state={"at": step},
            meta={"stage": "base"} | (meta or {}),
        )
    checkpoints.wait()


def restore_all(folder: Path, step: int | None = None):
    params, opt_state = make_state()
    return restore(folder, step, params_like=struct(params), opt_like=struct(opt_state))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(autouse=True)
def _base_dir(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


@pytest.fixture(scope="module")
def _saved(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("art") / "megacontext_base_d4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        with Checkpoints(folder, keep=None) as checkpoints:
            save(checkpoints, 10, 20)
    return folder


@pytest.fixture
def run(_saved, tmp_path) -> Path:
    """A run folder with steps 10 and 20, of its own for every test."""
    return Path(shutil.copytree(_saved, tmp_path / "art" / _saved.name))


# --- round trips ---------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    params, opt_state = make_state(3)
    meta = {
        "stage": "mid",
        "model_config": {"n_layer": np.int64(4)},
        "loop_state": {"best": float("inf"), "loss": np.float32(0.5), "curve": np.arange(3)},
    }
    data_state = {"next": 5, "deep": [1, {"x": None}]}
    folder = tmp_path / "megacontext_mid_d4"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, params=params, opt_state=opt_state, data_state=data_state, meta=meta)
        data_state["next"] = meta["stage"] = "changed after the call"
        assert checkpoints.latest_step() in (None, 7)
        checkpoints.wait()
        assert checkpoints.steps() == [7]
        assert checkpoints.stats["step"] == 7
        assert checkpoints.stats["bytes"] > 0
        assert 0 < checkpoints.stats["blocking_s"] <= checkpoints.stats["total_s"]
        restored = checkpoints.restore(params_like=struct(params), opt_like=struct(opt_state))
    assert restored.step == 7
    assert_same(restored.params, params)
    assert_same(restored.opt_state, opt_state)
    assert restored.data_state == {"next": 5, "deep": [1, {"x": None}]}
    assert restored.meta["model_config"] == {"n_layer": 4}
    assert restored.meta["loop_state"] == {"best": float("inf"), "loss": 0.5, "curve": [0, 1, 2]}
    assert {"stage": "mid", "step": 7, "format": 1}.items() <= restored.meta.items()
    assert restored.meta["versions"]["jax"] == jax.__version__
    assert read_meta(folder) == restored.meta
    # arrays do as templates, and the optimiser may be left out
    again = restore(folder, 7, params_like=params)
    assert_same(again.params, params)
    assert again.opt_state is None


def test_arrays_may_be_donated_at_once(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    big = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 1024)) for i in range(8)}
    expected = {name: np.array(x) for name, x in big.items()}
    jax.block_until_ready(overwrite(jax.tree.map(jnp.copy, big)))
    with Checkpoints(tmp_path / "megacontext_base_x") as checkpoints:
        checkpoints.save(1, params=big, opt_state=None, data_state={}, meta={})
        jax.block_until_ready(overwrite(big))
        checkpoints.wait()
    params = load_params(tmp_path / "megacontext_base_x")
    for name, x in expected.items():
        assert (np.asarray(params[name]) == x).all()


def test_parameters_alone(run):
    params, opt_state = make_state(20)
    shutil.rmtree(run / "000020" / "opt")
    assert_same(load_params(run), params)
    assert_same(load_params(run, 20, struct(params)), params)
    narrow = load_params(run, dtype=jnp.bfloat16)
    assert narrow["wte"].dtype == narrow["h"]["scale"].dtype == jnp.bfloat16
    assert narrow["n"].dtype == jnp.int32
    assert (narrow["wte"] == params["wte"].astype(jnp.bfloat16)).all()
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    assert load_params(run, 20, wide)["h"]["c_q"].dtype == jnp.float32
    with pytest.raises(UserError, match="is missing"):
        restore(run, 20, params_like=params, opt_like=opt_state)
    shutil.rmtree(run / "000020" / "params")
    assert read_meta(run)["step"] == 20


def test_without_optimiser_state(tmp_path):
    params, opt_state = make_state()
    with Checkpoints(tmp_path / "megacontext_rl_x") as checkpoints:
        checkpoints.save(1, params=params, opt_state=None, data_state={}, meta={}, blocking=True)
    with pytest.raises(UserError, match="000001 holds no 'opt'; it serves inference"):
        restore(tmp_path / "megacontext_rl_x", params_like=params, opt_like=opt_state)


def test_orbax_itself_reads_the_layout(run):
    options = ocp.CheckpointManagerOptions(step_format_fixed_length=6, read_only=True)
    params, _ = make_state(20)
    with ocp.CheckpointManager(run, options=options, item_names=("params", "opt")) as manager:
        assert list(manager.all_steps()) == [10, 20]
        args = ocp.args.Composite(params=ocp.args.StandardRestore(struct(params)))
        assert_same(manager.restore(20, args=args).params, params)


# --- what is kept --------------------------------------------------------------------------------------------


def test_keep_deletes_only_what_this_run_saved(run):
    with Checkpoints(run, keep=2) as checkpoints:  # a fresh run in an old folder
        save(checkpoints, 30, 40, 50)
        assert checkpoints.steps() == [10, 20, 40, 50]
    with Checkpoints(run, keep=1) as checkpoints:  # goes on with the second run
        params, opt_state = make_state()
        checkpoints.restore(params_like=params, opt_like=opt_state)
        save(checkpoints, 60)
        assert checkpoints.steps() == [10, 20, 60]
    with pytest.raises(UserError, match="At least one checkpoint"):
        Checkpoints(run, keep=0)


def test_a_step_is_never_overwritten(run):
    before = digest.read_manifest(run / "000020")
    with Checkpoints(run) as checkpoints:
        with pytest.raises(UserError, match=r"000020 exists and is not overwritten.*--fresh"):
            save(checkpoints, 20)
        save(checkpoints, 21)
    assert digest.read_manifest(run / "000020") == before


def test_one_writer(run):
    with Checkpoints(run), pytest.raises(UserError, match="already open for writing in this process"):
        Checkpoints(run)
    Checkpoints(run).close()


def test_run_is_linked_from_the_base_directory(tmp_path, base):
    with Checkpoints(tmp_path / "megacontext_base_linked") as checkpoints:
        save(checkpoints, 1)
    assert find_run("base", "linked") == base / "megacontext_base_linked"
    assert_same(load_params(base / "megacontext_base_linked"), make_state(1)[0])


# --- damage --------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return "is damaged .its digest differs."


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return "is truncated|is damaged"


def delete(path: Path) -> str:
    path.unlink()
    return "is missing"


def files_of(step_folder: Path) -> list[Path]:
    return sorted(p for p in step_folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete])
def test_every_damaged_file_is_refused_by_name(run, damage):
    files = files_of(run / "000020")
    assert {p.relative_to(run / "000020").parts[0] for p in files} >= {"params", "opt", "data", "meta"}
    assert len(files) > 25
    for path in files:
        intact = path.read_bytes()
        reason = damage(path)
        for step in (None, 20):
            with pytest.raises(UserError, match=reason) as refused:
                restore_all(run, step)
            assert str(path) in str(refused.value)
            assert str(refused.value).endswith(
                f"; remove or move away {run / '000020'}, then the same command goes on from step 10."
            )
        path.write_bytes(intact)
    assert restore_all(run).step == 20


def test_parameters_alone_are_checked_too(run):
    for path in files_of(run / "000020" / "params"):
        intact = path.read_bytes()
        flip_a_bit(path)
        with pytest.raises(UserError, match="is damaged"):
            load_params(run)
        path.write_bytes(intact)
    flip_a_bit(run / "000020" / "meta" / "meta.json")
    with pytest.raises(UserError, match=r"meta\.json is damaged"):
        read_meta(run)


def test_the_advice_for_a_damaged_latest_step_works(run):
    with Checkpoints(run, keep=None) as checkpoints:
        save(checkpoints, 30)
    for step in ("000020", "000030"):
        flip_a_bit(run / step / "params" / "_METADATA")
    with pytest.raises(UserError, match="000030/params/_METADATA is damaged") as refused:
        restore_all(run)
    assert str(refused.value).endswith(
        f"; remove or move away {run / '000020'} and {run / '000030'}, then the same command goes on from "
        "step 10."
    )
    for step in ("000020", "000030"):
        (run / step).rename(run / f"{step}.damaged")
    assert_same(restore_all(run).params, make_state(10)[0])
    with pytest.raises(UserError, match=r"has no step 15; its steps are 10\."):
        restore_all(run, 15)


def test_without_any_intact_step_the_run_starts_again(run):
    flip_a_bit(run / "000020" / "params" / "_METADATA")
    delete(run / "000010" / digest.MANIFEST)
    with pytest.raises(UserError) as refused:
        restore_all(run)
    assert str(refused.value).endswith(
        f"; remove or move away {run / '000010'} and {run / '000020'}, then the same command starts again: no "
        "step of this run can be read."
    )
    for step in ("000010", "000020"):
        shutil.rmtree(run / step)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.latest_step() is None
        save(checkpoints, 10)


def test_instead_of_an_earlier_damaged_step_another_can_be_asked_for(run):
    flip_a_bit(run / "000010" / "data" / "data.json")
    with pytest.raises(UserError, match=r"; ask for another step \(20 can be read\)\.$"):
        restore_all(run, 10)
    assert restore_all(run, 20).step == 20


def test_foreign_folders_and_files(run):
    extra = run / "000020" / "params" / "d" / "0123"
    extra.write_bytes(b"x")
    with pytest.raises(UserError, match="0123 was not saved with this checkpoint"):
        restore_all(run)
    extra.unlink()
    shutil.copy(run / "000010" / digest.MANIFEST, run / "000020" / digest.MANIFEST)
    with pytest.raises(UserError, match="000020 is a copy of step 10 under another name"):
        restore_all(run)
    shutil.copytree(run / "000010", run / "000030")
    with pytest.raises(UserError, match="000030 is a copy of step 10 under another name"):
        restore_all(run)
    (run / "000040").mkdir()
    (run / "000040" / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"000040/digests\.json is missing"):
        restore_all(run)
    (run / "000050").write_text("not a folder")
    with pytest.raises(UserError, match=r"000050/digests\.json is missing"):
        restore_all(run)


def test_a_newer_format_is_refused(run):
    manifest = digest.read_manifest(run / "000020")
    digest.seal(run / "000020", manifest["about"] | {"format": 99})
    with pytest.raises(UserError, match=r"written by a newer version \(format 99"):
        restore_all(run)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(UserError, match="holds no finished checkpoint"):
        restore_all(tmp_path / "nothing")


def test_unfinished_saves_are_dropped_with_a_sentence(run):
    said: list[str] = []
    shutil.copytree(run / "000020", run / "unfinished" / "000030")
    (run / "unfinished" / "000040.orbax-checkpoint-tmp").mkdir()
    (run / "unfinished" / "removed-000005").mkdir()
    assert restore_all(run).step == 20  # readers do not look there
    with Checkpoints(run, say=said.append) as checkpoints:
        assert checkpoints.latest_step() == 20
    assert len(said) == 1
    assert f"The save of step 30, 40 in {run} was interrupted" in said[0]
    assert "the latest finished step is 20" in said[0]
    assert not list((run / "unfinished").iterdir())


# --- what does not fit ---------------------------------------------------------------------------------------


def test_another_model_is_refused_with_both_shapes(run):
    params, opt_state = make_state()
    other = params | {"wte": jnp.zeros((64, 8))}
    with pytest.raises(
        UserError, match=r"params/wte is float32\[32, 8\] in the checkpoint and float32\[64, 8\] here"
    ):
        restore(run, params_like=other, opt_like=opt_state)
    with pytest.raises(UserError, match=r"params/wte is float32\[32, 8\]"):
        load_params(run, 20, other)
    with pytest.raises(
        UserError, match=r"params/wte is float32\[32, 8\] in the checkpoint and bfloat16\[32, 8\]"
    ):
        restore(run, params_like=params | {"wte": params["wte"].astype(jnp.bfloat16)})
    fewer = {name: x for name, x in params.items() if name != "n"}
    with pytest.raises(UserError, match=r"params/n is int32\[5\] in the checkpoint and absent here"):
        restore(run, params_like=fewer)
    with pytest.raises(
        UserError, match=r"opt/count is absent in the checkpoint and int32\[\] here.*and \d+ more"
    ):
        restore(run, params_like=params, opt_like=ADAM.init({"wte": params["wte"]}))
    with pytest.raises(UserError, match=r"params/more is absent in the checkpoint and float32\[2\] here"):
        restore(run, params_like=params | {"more": jnp.zeros(2)})


def test_settings_are_refused_with_both_values():
    meta = {"step": 5, "model_config": {"n_layer": 4, "window": None}, "seed": 1, "betas": [0.9, 0.95]}
    check_compatible(meta, {"seed": 1, "model_config": {"n_layer": 4}, "betas": (0.9, 0.95)})
    with pytest.raises(UserError) as refused:
        check_compatible(
            meta,
            {"seed": 2, "model_config": {"n_layer": 6, "window": None}, "tokenizer": "ab"},
            where="base d4",
        )
    assert str(refused.value) == (
        "These settings do not fit base d4: seed is 1 there and 2 here; model_config.n_layer is 4 there and 6 here; "
        'tokenizer is absent there and "ab" here; give the values saved there, or start another run with --fresh or '
        "--tag."
    )
    with pytest.raises(UserError, match="use --seed 1"):
        check_compatible(meta, {"seed": 2}, remedy="use --seed 1")
    # a value where there was a section
    with pytest.raises(UserError, match="model_config is absent there and 3 here"):
        check_compatible(meta, {"model_config": 3})


def test_a_setting_younger_than_the_checkpoint_counts_as_its_default():
    saved = {"seed": 1, "base": {"lr": 0.1}}
    defaults = {
        "seed": 5,
        "base": {"lr": 0.5, "packing": "concat", "betas": (0.9, 0.95)},
        "extra": {"on": True},
    }
    wanted = {
        "seed": 1,
        "base": {"lr": 0.1, "packing": "concat", "betas": [0.9, 0.95]},
        "extra": {"on": True},
    }
    check_compatible(saved, wanted, defaults=defaults)
    with pytest.raises(UserError, match=r"base\.packing is absent there and \"concat\" here"):
        check_compatible(saved, wanted)
    wanted["base"]["packing"] = "best_fit"
    with pytest.raises(
        UserError, match=r'checkpoint: base\.packing is "concat" there and "best_fit" here; give'
    ):
        check_compatible(saved, wanted, defaults=defaults)
    # what was saved goes before the default
    with pytest.raises(UserError, match=r"seed is 1 there and 5 here"):
        check_compatible(saved, {"seed": 5}, defaults=defaults)
    with pytest.raises(UserError, match=r"tokenizer is absent there"):
        check_compatible(saved, {"tokenizer": "ab"}, defaults=defaults)


def test_the_writer_names_its_folder(run):
    with Checkpoints(run) as checkpoints:
        meta = checkpoints.read_meta()
        checkpoints.check_compatible(meta, {"stage": "base", "new": 3}, {"new": 3})
        with pytest.raises(UserError, match=str(run)):
            checkpoints.check_compatible(meta, {"stage": "sft"})


# --- disks ---------------------------------------------------------------------------------------------------


def test_too_little_space_is_noticed_before_writing(run, monkeypatch):
    with Checkpoints(run) as checkpoints:
        monkeypatch.setattr(writer, "_free_bytes", lambda folder: 1_000_000)
        with pytest.raises(
            UserError, match=r"step 30 needs .* MB and .* has 1\.0 MB left.*last step saved is 20"
        ):
            save(checkpoints, 30)
        assert not list((run / "unfinished").iterdir())
        monkeypatch.undo()
        save(checkpoints, 30)
    assert checkpoints.steps() == [10, 20, 30]


def big_params() -> dict:
    return {f"w{i}": jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(4)}


ABANDONED = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pytest's own hook


@ABANDONED
def test_a_write_that_fails_midway(run, capfd):
    """A file-size limit makes the writes of the background threads fail wherever the tests run."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(29, params=make_state()[0], opt_state=None, data_state={}, meta={}, blocking=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            checkpoints.save(30, params=big_params(), opt_state=None, data_state={}, meta={})
            checkpoints._thread.join()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(
            UserError,
            match=rf"step 30 could not be written to {run} .*{os.strerror(errno.EFBIG)}.*last step saved is 29",
        ):
            checkpoints.check()
        assert checkpoints.steps() == [10, 20, 29]
        checkpoints.save(30, params=big_params(), opt_state=None, data_state={}, meta={})  # the run may go on
        checkpoints.wait()
        checkpoints.check()
    assert restore_all(run, 20).step == 20
    assert load_params(run, 30).keys() == big_params().keys()
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with open(path, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)) == 4096:
            pass


@ABANDONED
def test_a_full_disk(small_disk, monkeypatch):
    folder = small_disk / "megacontext_base_x"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, params=big_params(), opt_state=None, data_state={}, meta={}, blocking=True)
        with pytest.raises(UserError, match=r"step 2 needs 16\.8 MB and .* has .* MB left"):
            checkpoints.save(2, params=big_params(), opt_state=None, data_state={}, meta={})
        # somebody else fills the disk after the check
        monkeypatch.setattr(writer, "_free_bytes", lambda folder: 1 << 40)
        checkpoints.save(2, params=big_params(), opt_state=None, data_state={}, meta={})
        with pytest.raises(
            UserError, match=r"step 2 could not be written.*No space left.*last step saved is 1"
        ):
            checkpoints.wait()
        # not even room for a folder's name or a JSON file
        fill(small_disk / "fill")
        checkpoints.save(2, params=make_state()[0], opt_state=None, data_state={}, meta={"x": "y" * 100_000})
        with pytest.raises(UserError, match=r"step 2 could not be written.*No space left"):
            checkpoints.wait()
        (small_disk / "fill").unlink()
        assert checkpoints.steps() == [1]
    assert load_params(folder).keys() == big_params().keys()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Checkpoints cannot be written to .*set MEGACONTEXT_ARTIFACTS"):
        Checkpoints(tmp_path / "file" / "megacontext_base_x")


def test_other_errors_keep_their_nature(run, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    with Checkpoints(run) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(digest, "seal", fail)
            checkpoints.save(30, params=make_state()[0], opt_state=None, data_state={}, meta={})
            with pytest.raises(ZeroDivisionError):
                checkpoints.wait()
        assert checkpoints.steps() == [10, 20]
        assert not list((run / "unfinished").iterdir())
        with pytest.raises(TypeError, match="cannot be stored as JSON"):
            save(checkpoints, 30, meta={"x": object()})
        save(checkpoints, 30)


def test_the_first_error_is_the_one_reported(run, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    def crash():
        with Checkpoints(run, say=said.append) as checkpoints:
            monkeypatch.setattr(digest, "seal", fail)
            checkpoints.save(40, params=make_state()[0], opt_state=None, data_state={}, meta={})
            raise KeyError("the first error")

    said: list[str] = []
    with pytest.raises(KeyError):
        crash()
    assert said == ["The save under way failed as well: a bug"]
    Checkpoints(run).close()  # the lock was let go
