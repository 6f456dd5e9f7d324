"""The recipe as a user runs it: from nothing to an answer; stages killed, continued, repeated, changed."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, N, command, environment, kill_when_saved, losses, run

STAGES = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft"}


def recipe(folder: Path, *words: str, status: int = 0) -> str:
    env = environment(folder) | {"MEGACONTEXT_PYTHON": sys.executable}
    done = subprocess.run(["bash", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The whole recipe, uninterrupted."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "said.txt").write_text(recipe(folder, "run10.sh", "--config", "tests/tiny.yaml"))
    return folder


def test_the_recipe_goes_from_nothing_to_an_answer(trained):
    said = (trained / "said.txt").read_text()
    assert "Traceback" not in said
    report = trained / "artifacts/report"
    for stage in ("mid", "sft"):
        results = json.loads((report / f"chat_eval_{stage}.json").read_text())
        assert {"ledger", "facts"} <= results.keys()
        assert all({"accuracy", "chance", "n"} <= r.keys() for r in results.values())
    text = (report / "report.md").read_text()
    for heading in ("Base model training", "Midtraining", "Chat SFT", "Base model loss", "Summary"):
        assert heading in text
    for picture in ("loss.png", "accuracy.png"):
        assert picture in text
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
    assert "python bpb" in json.dumps(json.loads((report / "base-model-loss.json").read_text()))
    for stage in STAGES:
        curve = losses(trained, f"megacontext_{stage}_d2")
        assert sorted(curve) == list(range(N))
        assert curve[N - 1] < curve[0]
        assert (trained / f"artifacts/megacontext_{stage}_d2/{N:06d}").is_dir()
    link = trained / "base/megacontext_base_d2"
    assert link.is_symlink()
    assert link.resolve() == (trained / "artifacts/megacontext_base_d2").resolve()


def test_one_prompt_gets_one_answer(trained):
    said = run(trained, "chat_cli", "-p", "2 + 3?", "-t", "0", "-m", "3")
    assert said.strip()
    too_long = run(trained, "chat_cli", "-p", "word " * 200, status=2)
    assert "64" in too_long
    assert "Traceback" not in too_long


def test_the_big_recipes_refuse_this_machine_and_show_their_plan(tmp_path):
    for name, parameters in (("speedrun", "560,988,160"), ("run1000", "1,879,048,192")):
        assert "--dry-run" in recipe(tmp_path, f"{name}.sh", status=2)
        for flag in ("--dry-run", "--dry_run=true"):
            assert parameters in recipe(tmp_path, f"{name}.sh", flag)
    assert not (tmp_path / "artifacts").exists()
    assert "bash run10.sh" in recipe(tmp_path, "run10.sh", "--help")
    assert "--depth" in recipe(tmp_path, "run10.sh", "--config", "tests/tiny.yaml", "--dpeth", "3", status=2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_continues_to_the_same_losses(trained, tmp_path, stage):
    kill_after = {"base": 3, "mid": 6, "sft": 3}[
        stage
    ]  # a save waits for the one before, so it is not far beyond
    for part in ("base", *(f"artifacts/megacontext_{s}_d2" for s in STAGES if s < stage or stage != "base")):
        if part != f"artifacts/megacontext_{stage}_d2":
            shutil.copytree(trained / part, tmp_path / part, symlinks=True)
    shutil.rmtree(tmp_path / f"artifacts/megacontext_{stage}_d2", ignore_errors=True)
    kill_when_saved(tmp_path, f"megacontext_{stage}_d2", kill_after, STAGES[stage])
    said = run(tmp_path, STAGES[stage])
    assert re.search(r"Continuing megacontext_\w+ at step [1-9]", said), said
    assert losses(tmp_path, f"megacontext_{stage}_d2") == losses(trained, f"megacontext_{stage}_d2")


def test_a_finished_stage_says_so_and_a_changed_flag_is_refused_with_both_values(trained):
    before = sorted(p.name for p in (trained / "artifacts/megacontext_base_d2").iterdir())
    assert "is finished (12 steps)" in run(trained, "base_train")
    said = run(trained, "base_train", "--matrix-lr", "0.5", "--seed", "3", status=2)
    assert "0.01" in said
    assert "0.5" in said
    assert "42" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in (trained / "artifacts/megacontext_base_d2").iterdir()) == before


def test_fresh_starts_under_a_new_tag_and_deletes_nothing(trained):
    run(trained, "base_train", "--fresh", "--num-iterations", "2", "--eval-every", "-1")
    assert (trained / "artifacts/megacontext_base_d2-2/000002").is_dir()
    assert (trained / f"artifacts/megacontext_base_d2/{N:06d}").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_the_same_command_continues(trained, tmp_path, number):
    shutil.copytree(trained / "base", tmp_path / "base", symlinks=True)
    long = ("--num-iterations", "100000", "--save-every", "-1", "--eval-every", "-1")
    process = subprocess.Popen(
        command("base_train", *long), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "artifacts/megacontext_base_d2/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "run the same command to continue" in said
    (saved,) = (tmp_path / "artifacts/megacontext_base_d2").glob("0*")
    assert int(saved.name) >= 5

    # again, and this time twice: the second signal ends it at once
    process = subprocess.Popen(
        command("base_train", *long), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step "):
            break
    assert f"Continuing megacontext_base_d2 at step {int(saved.name)} " in said
    assert line.startswith(f"step {int(saved.name):05d}/")
    process.send_signal(number)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number


def test_a_damaged_checkpoint_is_refused_by_name(trained, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "base", symlinks=True)
    shutil.copytree(trained / "artifacts", tmp_path / "artifacts")
    step = tmp_path / f"artifacts/megacontext_base_d2/{N:06d}"
    data = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damaged = bytearray(data.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    data.write_bytes(damaged)
    shutil.rmtree(tmp_path / "artifacts/megacontext_mid_d2")
    said = run(tmp_path, "mid_train", status=2)
    assert data.name in said
    assert "Traceback" not in said


def test_a_run_with_another_tokenizer_is_refused(trained, tmp_path):
    shutil.copytree(trained / "artifacts", tmp_path / "artifacts")
    shutil.copytree(trained / "base", tmp_path / "base", symlinks=True)
    (corpus,) = (tmp_path / "base/builtin").iterdir()
    run(tmp_path, "tok_train", "--vocab-size", "400")
    shutil.rmtree(tmp_path / "artifacts/megacontext_sft_d2/tokenizer")
    shutil.copytree(corpus / "tokenizer_400", tmp_path / "artifacts/megacontext_sft_d2/tokenizer")
    for script in ("chat_cli", "chat_eval"):
        said = run(tmp_path, script, "-p", "2+2?", status=2)
        assert "512" in said
        assert "400" in said


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        ("base_train", ("--depht", "3"), "--depth"),
        ("base_train", ("--data-dir", "/does/not/exist"), "/does/not/exist"),
        ("base_train", ("--vocab-size", "600"), "tok_train"),
        ("mid_train", ("--tag", "nothing"), "nothing"),
        ("base_train", ("--total-batch-size", "100"), "--total-batch-size"),
        ("base_train", ("--attention-impl", "cudnn", "--fresh"), "cudnn"),
        ("base_train", ("--tensor-axis", "3"), "--tensor-axis"),
        ("base_train", ("--compute-dtype", "bfloat16"), "compute_dtype"),
    ],
)
def test_mistakes_are_one_clear_sentence(trained, script, flags, word):
    said = run(trained, script, *flags, status=2)
    assert word in said
    assert "Traceback" not in said
