"""As a user: a model of the newest generation is trained, exported, imported elsewhere, continued and taught to chat."""

import json
import shutil
from functools import partial

import pytest

from tests.runs import losses, run

plain = partial(run, configured=False)


@pytest.fixture(scope="module")
def latest(tmp_path_factory):
    """Four of eight steps of pretraining, and the data for all stages."""
    folder = tmp_path_factory.mktemp("latest")
    run(folder, "prepare_data")
    run(folder, "tok_train")
    said = run(folder, "base_train", "--arch", "latest", "--num-iterations", "4", "--save-every", "2")
    assert "latest, optimiser latest" in said
    return folder


def test_a_run_crosses_to_nanochat_and_back_and_goes_on(latest, tmp_path):
    out = tmp_path / "nanochat"
    said = plain(latest, "export_nanochat", "-i", "base", "--out", str(out), "--ranks", "2")
    assert "optim_000004_rank1.pt" in said
    meta = json.loads((out / "base_checkpoints/d2/meta_000004.json").read_text())
    assert meta["step"] == 4
    assert meta["model_config"]["window_pattern"] == "SSSL"
    there = tmp_path / "there"
    shutil.copytree(
        latest / "base", there / "base", ignore=shutil.ignore_patterns("megacontext_*"), symlinks=True
    )
    assert "optimiser state of 2 GPU(s)" in plain(there, "import_nanochat", str(out))
    said = run(there, "base_train", "--arch", "latest", "--num-iterations", "6")
    assert "Continuing megacontext_base_d2 at step 4 of 6" in said
    curve = losses(there, "megacontext_base_d2")
    assert sorted(curve) == [4, 5]
    assert all(0 < loss < 6.3 for loss in curve.values())
    refused = run(there, "base_train", "--arch", "era4", "--num-iterations", "8", status=2)
    assert "latest" in refused
    assert "era4" in refused
    said = run(there, "chat_sft", "--num-iterations", "2")  # without --arch: the model's own
    assert "There is no mid run 'd2'; sft starts from megacontext_base_d2" in said
    assert "latest, optimiser latest" in said
    run(there, "chat_eval", "-i", "sft", "-a", "facts")
    plain(there, "export_nanochat", "-i", "sft", "--out", str(out))
    assert (out / "chatsft_checkpoints/d2/model_000002.pt").exists()


def test_pocket_models_have_no_place_in_nanochat(tmp_path):
    run(tmp_path, "prepare_data")
    run(tmp_path, "tok_train")
    run(tmp_path, "base_train", "--num-iterations", "1")
    said = plain(tmp_path, "export_nanochat", "-i", "base", "--out", str(tmp_path / "out"), status=2)
    assert "pocket" in said
    assert not (tmp_path / "out").exists()
