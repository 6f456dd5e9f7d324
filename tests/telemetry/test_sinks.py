import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.telemetry import sinks
from megacontext_jax.telemetry.sinks import open_metrics, read_metrics, series

WANDB_VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_INIT_TIMEOUT",
    "WANDB_IDENTITY_TOKEN_FILE",
    "MEGACONTEXT_ENABLE_WANDB",
    "MC_OTEL_ENDPOINT",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def open_plain(folder, resume_step=None, **options):
    return open_metrics(folder, stage="base", run_name="dummy", resume_step=resume_step, **options)


def train_run(folder, start, stop, resume_step=None):
    """Logs as a loop does: an evaluation before every fourth step, then the step."""
    with open_plain(folder, resume_step) as metrics:
        for step in range(start, stop):
            if step % 4 == 0:
                metrics.log({"val/bpb": 2.0 - step / 10}, step)
            metrics.log({"train/loss": 5.0 - step / 10}, step)
    return metrics.path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(records):
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


class TestJsonl:
    def test_one_line_per_call_with_plain_numbers(self, tmp_path):
        with open_plain(tmp_path / "run") as metrics:
            metrics.log({"train/loss": np.float32(1.5), "ids": np.arange(3), "note": "x"}, np.int32(7))
            metrics.log({"train/loss": math.nan, "a": math.inf, "b": -math.inf}, 8)
        first, second = lines(metrics.path)
        assert first.keys() == {"step", "time", "train/loss", "ids", "note"}
        assert (first["step"], first["train/loss"], first["ids"], first["note"]) == (7, 1.5, [0, 1, 2], "x")
        assert first["time"] > 1.7e9
        assert second["train/loss"] == "NaN"  # strict JSON has no NaN
        record = read_metrics(metrics.path)[1]
        assert math.isnan(record["train/loss"])
        assert (record["a"], record["b"]) == (math.inf, -math.inf)

    def test_lines_are_on_disk_before_close(self, tmp_path):
        metrics = open_plain(tmp_path)
        metrics.log({"train/loss": 1.0}, 0)
        assert len(lines(metrics.path)) == 1
        metrics.close()
        metrics.close()  # twice is fine

    def test_resumed_file_equals_an_uninterrupted_one(self, tmp_path):
        whole = train_run(tmp_path / "whole", 0, 13)
        # Checkpoint at 8, killed at 11: the run goes on at 8 and evaluates there again.
        train_run(tmp_path / "cut", 0, 11)
        cut = train_run(tmp_path / "cut", 8, 13, resume_step=8)
        assert without_time(read_metrics(cut)) == without_time(read_metrics(whole))

    def test_evaluation_at_the_resumed_step_survives_if_it_is_not_run_again(self, tmp_path):
        path = train_run(tmp_path, 0, 11)
        with open_plain(tmp_path, resume_step=8) as metrics:
            metrics.log({"train/loss": 0.5}, 8)
            metrics.log({"train/loss": 0.4}, 9)
        assert series(read_metrics(path), "val/bpb") == ([0, 4, 8], [2.0, 1.6, 1.2])
        assert series(read_metrics(path), "train/loss")[0] == list(range(10))
        assert series(read_metrics(path), "train/loss")[1][8:] == [0.5, 0.4]

    def test_training_from_the_resumed_step_on_is_taken_back_at_once(self, tmp_path):
        path = train_run(tmp_path, 0, 11)
        open_plain(tmp_path, resume_step=8).close()
        assert series(read_metrics(path), "train/loss")[0] == list(range(8))
        assert series(read_metrics(path), "val/bpb")[0] == [0, 4, 8]

    def test_repeated_resume_at_the_same_step_does_not_add_up(self, tmp_path):
        train_run(tmp_path, 0, 11)
        for _ in range(3):
            path = train_run(tmp_path, 8, 9, resume_step=8)
        assert [record["step"] for record in read_metrics(path) if "val/bpb" in record] == [0, 4, 8]
        assert len(lines(path)) == 9 + 3

    def test_torn_last_line_is_repaired_on_resume_and_passed_over_by_readers(self, tmp_path):
        path = train_run(tmp_path, 0, 3)
        with open(path, "ab") as file:
            file.write(b'{"step": 3, "train/lo')
        assert [record["step"] for record in read_metrics(path)] == [0, 0, 1, 2]
        with open_plain(tmp_path, resume_step=3) as metrics:
            metrics.log({"train/loss": 1.0}, 3)
        assert [record["step"] for record in lines(path)] == [0, 0, 1, 2, 3]

    def test_last_line_whole_but_for_its_newline_is_kept(self, tmp_path):
        path = train_run(tmp_path, 0, 3)
        path.write_bytes(path.read_bytes()[:-1])
        with open_plain(tmp_path, resume_step=3) as metrics:
            metrics.log({"train/loss": 1.0}, 3)
        assert [record["step"] for record in lines(path)] == [0, 0, 1, 2, 3]

    def test_foreign_lines_in_the_middle_are_not_lost(self, tmp_path):
        path = train_run(tmp_path, 0, 2)
        data = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(data[0] + b"# a remark\n" + b"".join(data[1:]))
        train_run(tmp_path, 1, 3, resume_step=1)
        assert b"# a remark\n" in path.read_bytes()
        assert [record["step"] for record in read_metrics(path)] == [0, 0, 1, 2]

    def test_fresh_start_moves_the_old_file_aside(self, tmp_path):
        old = train_run(tmp_path, 0, 5).read_bytes()
        train_run(tmp_path, 0, 2)
        aside = list(tmp_path.glob("metrics.*.jsonl"))
        assert [path.read_bytes() for path in aside] == [old]
        assert len(lines(tmp_path / "metrics.jsonl")) == 3

    def test_rewinding_leaves_no_temporary_file(self, tmp_path):
        train_run(tmp_path, 0, 6)
        train_run(tmp_path, 2, 3, resume_step=2)
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_full_disk_is_one_sentence(self, tmp_path, monkeypatch):
        metrics = open_plain(tmp_path)

        class Full:
            def write(self, data):
                raise OSError(28, "No space left on device")

            def close(self):
                pass

        monkeypatch.setattr(metrics._sinks[0], "_file", Full())
        with pytest.raises(UserError, match=r"metrics.jsonl \(No space left on device\)"):
            metrics.log({"train/loss": 1.0}, 0)

    def test_atomic_write_keeps_the_old_file_when_it_fails(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        sinks.write_atomic(path, "old")

        def no_space(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_space)
        with pytest.raises(UserError, match="No space left"):
            sinks.write_atomic(path, "new")
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_other_processes_write_nothing(self, tmp_path):
        with open_plain(tmp_path / "run", primary=False) as metrics:
            metrics.log({"train/loss": 1.0}, 0)
        assert not (tmp_path / "run").exists()

    def test_unwritable_folder_and_unknown_names(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file/run"):
            open_plain(tmp_path / "file" / "run")
        with pytest.raises(UserError, match="'pretrain'"):
            open_metrics(tmp_path, stage="pretrain")
        with pytest.raises(UserError, match="'sometimes'"):
            open_metrics(tmp_path, stage="base", wandb_mode="sometimes")
        with pytest.raises(UserError, match="no metrics file"):
            read_metrics(tmp_path / "missing.jsonl")


def holds(path, text, patience=10.0):
    """True once the file holds the text; wandb's own process writes it a moment after the run is closed."""
    end = time.monotonic() + patience
    while text not in path.read_bytes():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class FakeRun:
    """Stands for a wandb run that was resumed with `step` records on the server."""

    def __init__(self, step=0, fails=False):
        self.step, self.fails, self.logged, self.finished = step, fails, [], None

    def log(self, values, step):
        if self.fails:
            raise ConnectionError("gone\nwith details")
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.finished = exit_code


class TestWandb:
    def test_offline_run_is_really_made_and_keeps_its_id(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")  # offline counts as reachable
        run_dir = tmp_path / "megacontext_sft_d4"
        said = []
        config = {"depth": 4, "folder": tmp_path, "lr": np.float32(0.5)}
        metrics = open_metrics(run_dir, stage="sft", config=config, say=said.append)
        assert "offline, project nanochat-sft, run megacontext_sft_d4" in metrics.describe()
        with metrics:
            metrics.log({"train/loss": 1.25}, 0)
        identity = json.loads((run_dir / "wandb_run.json").read_text())["id"]
        with open_metrics(run_dir, stage="sft", resume_step=0, say=said.append) as metrics:
            metrics.log({"train/loss": 1.25}, 0)
        folders = list((run_dir / "wandb").glob(f"offline-run-*-{identity}*"))
        assert len(folders) == 2
        for folder in folders:
            assert holds(folder / f"run-{identity}.wandb", b"nanochat-sft")
        assert len(lines(run_dir / "metrics.jsonl")) == 1
        assert said == []

    def test_enforced_without_key_fails_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")
        with pytest.raises(
            UserError, match=r"MEGACONTEXT_ENABLE_WANDB=1.*no WANDB_API_KEY.*WANDB_MODE=offline"
        ):
            open_metrics(tmp_path, stage="base", run_name="dummy")
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_enforced_without_the_package_fails_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(
            UserError, match=r"MEGACONTEXT_ENABLE_WANDB=1.*the wandb package cannot be imported"
        ):
            open_metrics(tmp_path, stage="base")
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_project_can_be_named(self, tmp_path, monkeypatch):
        projects = []

        def init(run_dir, mode, project, *rest):
            projects.append(project)
            return FakeRun()

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(sinks, "_init_wandb", init)
        for project in ("megacontext", None):
            with open_metrics(tmp_path, stage="mid", project=project) as metrics:
                assert f"offline, project {projects[-1]}, run" in metrics.describe()
        assert projects == ["megacontext", "nanochat-mid"]

    def test_enforced_but_disabled_is_a_contradiction(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "true")
        monkeypatch.setenv("WANDB_MODE", "disabled")
        with pytest.raises(UserError, match="demands wandb, which is disabled"):
            open_metrics(tmp_path, stage="base", run_name="mine")

    def test_no_server_fails_when_enforced_and_is_one_sentence_otherwise(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
        said = []
        with open_metrics(tmp_path / "a", stage="mid", say=said.append) as metrics:
            metrics.log({"train/loss": 1.0}, 0)
        assert len(said) == 1
        assert "wandb cannot be reached" in said[0]
        assert "\n" not in said[0]
        assert len(lines(metrics.path)) == 1
        assert "wandb: off (" in metrics.describe()
        monkeypatch.setenv("MEGACONTEXT_ENABLE_WANDB", "1")
        with pytest.raises(UserError, match="MEGACONTEXT_ENABLE_WANDB=1 but wandb cannot be reached"):
            open_metrics(tmp_path / "b", stage="mid")

    @pytest.mark.parametrize(
        ("environment", "name", "mode"),
        [
            ({}, "", "disabled"),
            ({}, "dummy", "disabled"),
            ({}, "mine", "online"),
            ({"WANDB_API_KEY": "k"}, "", "online"),
            ({"WANDB_API_KEY": "k"}, "dummy", "disabled"),
            ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
            ({"WANDB_MODE": "dryrun"}, "", "offline"),
            ({"WANDB_MODE": "offline"}, "dummy", "disabled"),
            ({"WANDB_MODE": "disabled"}, "mine", "disabled"),
            ({"MEGACONTEXT_ENABLE_WANDB": "0"}, "dummy", "disabled"),
            ({"MEGACONTEXT_ENABLE_WANDB": "1"}, "dummy", "online"),
            ({"MEGACONTEXT_ENABLE_WANDB": "1", "WANDB_MODE": "offline"}, "dummy", "offline"),
        ],
    )
    def test_mode_follows_environment_and_name(self, monkeypatch, environment, name, mode):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        assert sinks._wandb_mode("auto", name)[0] == mode

    def test_unknown_mode_in_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "maybe")
        with pytest.raises(UserError, match="Unknown WANDB_MODE 'maybe'"):
            open_metrics(tmp_path, stage="base")

    def test_named_run_without_key_says_so_and_goes_on(self, tmp_path):
        said = []
        open_metrics(tmp_path, stage="base", run_name="mine", say=said.append).close()
        assert len(said) == 1
        assert "no WANDB_API_KEY" in said[0]
        assert (tmp_path / "metrics.jsonl").exists()

    def test_login_file_counts_as_a_key(self, tmp_path, monkeypatch):
        assert not sinks._has_credentials("https://host.example")
        (tmp_path / "netrc").write_text("machine host.example login user password secret\n")
        (tmp_path / "netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert sinks._has_credentials("https://host.example")
        assert not sinks._has_credentials("https://other.example")

    def test_steps_the_server_has_are_not_sent_again(self):
        run = FakeRun(step=5)
        sink = sinks.WandbSink(run, print)
        for step in (3, 4, 5, 6):
            sink.log({"train/loss": np.float32(step), "x": math.nan}, step)
        assert [step for step, _ in run.logged] == [5, 6]
        assert run.logged[0][1]["step"] == 5
        assert isinstance(run.logged[0][1]["train/loss"], float)
        assert math.isnan(run.logged[0][1]["x"])

    def test_failure_during_the_run_is_said_once_and_survived(self):
        said = []
        sink = sinks.WandbSink(FakeRun(fails=True), said.append)
        for step in range(3):
            sink.log({"train/loss": 1.0}, step)
        sink.close()
        assert len(said) == 1
        assert "gone" in said[0]
        assert "details" not in said[0]

    def test_exception_in_the_run_is_its_exit_code(self, tmp_path):
        run = FakeRun()
        metrics = open_plain(tmp_path)
        metrics._sinks.append(sinks.WandbSink(run, print))
        with pytest.raises(ZeroDivisionError), metrics:
            raise ZeroDivisionError
        assert run.finished == 1

    def test_damaged_identity_is_refused_by_name(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        (tmp_path / "wandb_run.json").write_text("{")
        with pytest.raises(UserError, match=r"wandb_run.json is damaged"):
            open_metrics(tmp_path, stage="base", resume_step=3)


def test_telemetry_does_not_import_jax():
    modules = "sinks, names, otel, progress, hardware, report, plots"
    code = f"from megacontext_jax.telemetry import {modules}; import sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
