"""The parity command: it passes where it should and fails where it should."""

import importlib.util
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.interop import parity
from megacontext_jax.interop.torch_file import TorchFile, write_torch_file
from scripts.parity import main
from tests.model.nanochat_weights import CASES

CASE_DIR = Path(__file__).parents[1] / "golden/nanochat"
TINY = CASE_DIR / "era3_feb05_ve32_half_window"


def flags(case: str) -> list[str]:
    return ["--softcap", "20"] if "softcap20" in case else []


@pytest.mark.parametrize("case", CASES[1:6] + CASES[7:8])  # one of each era; the model tests compare all
def test_golden_checkpoints_pass(case, capsys):
    folder = CASE_DIR / case
    assert main([str(folder), "--expect", str(folder / "io.npz"), *flags(case)]) == 0
    said = capsys.readouterr().out
    for quantity in ("logits", "argmax", "loss, as stored", "loss_masked", "after block 1", "gradient norms"):
        assert quantity in said
    assert "TOO MUCH" not in said


@pytest.mark.parametrize("case", ["classic_mha", "head_swa"])
def test_bfloat16_passes_with_the_tolerances_of_bfloat16_only(case, capsys):
    folder = CASE_DIR / case
    command = [str(folder), "--expect", str(folder / "io.npz"), "--compute-dtype", "bfloat16"]
    assert main(command) == 0
    assert main([*command, "--tolerance", "1e-3"]) == 1
    assert "logits, mean" in capsys.readouterr().out


def test_a_wrong_soft_cap_or_a_changed_weight_does_not_pass(tmp_path, capsys):
    folder = CASE_DIR / "era3b_mar04_softcap20"
    assert main([str(folder), "--expect", str(folder / "io.npz")]) == 1
    assert "TOO MUCH" in capsys.readouterr().out
    shutil.copytree(TINY, tmp_path / "changed")
    path = next((tmp_path / "changed").glob("model_*.pt"))
    with TorchFile(path) as file:
        arrays = {name: t.read() for name, t in file.tree.items()}
    arrays["transformer.h.1.attn.c_v.weight"][3, 5] += 0.01
    write_torch_file(path, arrays)
    assert main([str(tmp_path / "changed"), "--expect", str(TINY / "io.npz")]) == 1
    said = capsys.readouterr().out
    assert "after block 0 (relative)" in said
    ok = {line.split("  ")[0] for line in said.splitlines() if line.endswith("ok")}
    assert "after block 0 (relative)" in ok  # the table shows where it begins
    assert "after block 1 (relative)" not in ok


@pytest.mark.parametrize("name", ["logits", "loss", "loss_sum", "loss_none", "grad_norms", parity.STREAM])
def test_each_quantity_can_fail_on_its_own(name, tmp_path):
    arrays = parity.read_arrays(TINY / "io.npz")
    kept = {key: arrays[key] for key in ("input_ids", "targets", "param_names", name)}
    save(tmp_path / "same.npz", kept)
    assert main([str(TINY), "--expect", str(tmp_path / "same.npz")]) == 0
    for damage in (lambda x: x * 1.001, lambda x: x * np.nan):
        save(tmp_path / "other.npz", kept | {name: damage(arrays[name])})
        assert main([str(TINY), "--expect", str(tmp_path / "other.npz")]) == 1


def save(path: Path, arrays: dict) -> None:
    np.savez(path, **arrays)


def test_what_is_saved_is_what_is_expected_next_time(tmp_path, capsys):
    for target in ("a.npz", "b.npz"):
        assert main([str(TINY), "--save", str(tmp_path / target), "--length", "24", "--seed", "3"]) == 0
    assert main([str(TINY), "--expect", str(tmp_path / "a.npz")]) == 0
    a, b = (parity.read_arrays(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert a["logits"].shape == (2, 24, 256)
    np.testing.assert_array_equal(a["logits"], b["logits"])
    save(tmp_path / "tokens.npz", {"input_ids": a["input_ids"][:1]})
    assert main([str(TINY), "--tokens", str(tmp_path / "tokens.npz"), "--save", str(tmp_path / "c.npz")]) == 0
    np.testing.assert_allclose(parity.read_arrays(tmp_path / "c.npz")["logits"], a["logits"][:1], atol=1e-5)


def test_one_of_our_runs_is_a_checkpoint_too(tmp_path, monkeypatch):
    from scripts import import_nanochat

    base = CASE_DIR.parent / "pipeline_head/base_dir"
    import_nanochat.main([str(base)])
    run = tmp_path / "artifacts/megacontext_base_d2"
    theirs = base / "base_checkpoints/d2"
    assert main([str(theirs), "--save", str(tmp_path / "theirs.npz")]) == 0
    for ours in (run, run / "000007"):
        assert main([str(ours), "--expect", str(tmp_path / "theirs.npz")]) == 0


def test_files_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    arrays = parity.read_arrays(TINY / "io.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    save(tmp_path / "no_ids.npz", {"logits": arrays["logits"]})
    save(tmp_path / "flat.npz", {"input_ids": arrays["input_ids"][0]})
    save(tmp_path / "big.npz", {"input_ids": arrays["input_ids"] + 1000})
    save(tmp_path / "shape.npz", arrays | {"logits": arrays["logits"][:, :, :9]})
    save(tmp_path / "nothing.npz", {"input_ids": arrays["input_ids"]})
    save(tmp_path / "no_targets.npz", {key: arrays[key] for key in ("input_ids", "loss")})
    save(tmp_path / "other_targets.npz", arrays | {"targets": arrays["targets"][:, :5]})
    save(tmp_path / "big_targets.npz", arrays | {"targets": arrays["targets"] + 900})
    save(tmp_path / "names.npz", arrays | {"param_names": np.array(["transformer.h.77.attn"])})
    save(tmp_path / "floats.npz", {"input_ids": arrays["input_ids"] * 0.5})
    for name, word in [
        ("absent.npz", "absent"),
        ("text.npz", "npz"),
        ("no_ids.npz", "input_ids"),
        ("flat.npz", "table"),
        ("big.npz", "from 0 to 255"),
        ("shape.npz", "shape"),
        ("nothing.npz", "no quantity"),
        ("no_targets.npz", "no targets"),
        ("other_targets.npz", "shape"),
        ("big_targets.npz", "targets"),
        ("names.npz", "h.77"),
        ("floats.npz", "whole numbers"),
    ]:
        with pytest.raises(UserError, match=word):
            main([str(TINY), "--expect", str(tmp_path / name)])
    with pytest.raises(UserError, match="Nothing to compare"):
        main([str(TINY)])
    with pytest.raises(UserError, match="checkout"):
        main([str(TINY), "--torch-module", str(tmp_path)])
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat/gpt.py").write_text("raise ImportError('no wheel')")
    reason = "no wheel" if importlib.util.find_spec("torch") else "install"
    with pytest.raises(UserError, match=reason):
        main([str(TINY), "--torch-module", str(tmp_path)])


def test_gradients_are_matched_by_name_and_zero_equals_zero():
    names, norms = np.array(["lm_head.weight", "smear_lambda", "h"]), np.array([2.0, 1e-9, 0.0])
    theirs = {"param_names": names, "grad_norms": norms}
    ours = {"param_names": names[::-1], "grad_norms": norms[::-1]}
    assert all(row.passed for row in parity._gradient_rows(ours, theirs, 1e-5))
    ours["grad_norms"] = np.array([1e-9, 1e-9, 2.0])
    assert not all(row.passed for row in parity._gradient_rows(ours, theirs, 1e-5))
    assert parity.left_out(theirs | {"rope_cos": norms, "grad:h": norms}) == ["rope_cos"]


def test_losses_of_logits_are_exact_and_ignore_what_is_ignored():
    logits_BTV = np.array([[[0.0, 0.0], [100.0, 0.0], [3.0, 1.0]]])
    nll_BT = parity.nats(logits_BTV, np.array([[1, 0, -1]]))
    np.testing.assert_allclose(nll_BT, [[np.log(2.0), np.log1p(np.exp(-100.0)), 0.0]], atol=1e-12)


def test_rows_of_random_tokens_are_the_same_for_a_seed():
    model = parity.open_model(TINY)
    a, b, c = (parity.random_tokens(model.cfg, 2, 8, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a["input_ids"], b["input_ids"])
    assert (a["input_ids"] != c["input_ids"]).any()
    np.testing.assert_array_equal(a["input_ids"][:, 1:], a["targets"][:, :-1])
    assert jnp.asarray(a["input_ids"]).dtype == jnp.int32
