import struct

import numpy as np
import pytest

from megacontext_jax.telemetry import plots


def fake_run(steps=50, tokens=1000, bpb=True):
    records = []
    for step in range(steps):
        loss = 8 * np.exp(-step / 10) + 1
        records.append(
            {
                "step": step,
                "train/loss": loss,
                "train/lrm": 1 - step / steps,
                "train/tok_per_sec": 9000.0,
                "total_training_tokens": (step + 1) * tokens,
            }
        )
        if bpb and step % 10 == 0:
            records.append({"step": step, "val/bpb": loss / 4})
    return records


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("draw", [plots.training_curves, plots.schedule_curves])
def test_curves_are_drawn(tmp_path, draw):
    path = draw({"base": fake_run(), "sft": fake_run(bpb=False)}, tmp_path / "curves.png")
    width, height = png_size(path)
    assert 1200 <= width <= 1500
    assert 600 <= height <= 900
    assert [item.name for item in tmp_path.iterdir()] == ["curves.png"]


def test_nothing_to_draw_writes_nothing(tmp_path):
    assert plots.training_curves({}, tmp_path / "a.png") is None
    assert plots.training_curves({"base": [{"step": 0, "val/bpb": 1.0}]}, tmp_path / "a.png") is None
    assert plots.accuracy_bars({}, tmp_path / "a.png") is None
    assert list(tmp_path.iterdir()) == []


def test_a_single_point_and_non_finite_losses(tmp_path):
    assert plots.training_curves({"base": fake_run(1)}, tmp_path / "a.png")
    broken = [{"step": step, "train/loss": float("nan")} for step in range(5)]
    assert plots.training_curves({"base": broken}, tmp_path / "b.png")


def curve_of(records, key):
    figure = plots.Figure()
    axes = figure.add_subplot()
    label = plots._curve(axes, records, key, "black")
    return label, axes.lines[0].get_xdata(), axes.lines[0].get_ydata()


def test_curves_run_over_tokens_where_they_were_logged():
    records = [*fake_run(10, tokens=100), {"step": 10, "val/bpb": 1.0}]
    label, x, _ = curve_of(records, "train/loss")
    assert label == "training tokens"
    np.testing.assert_allclose(x, np.arange(100, 1001, 100))
    _, x, y = curve_of(records, "val/bpb")
    np.testing.assert_allclose(x, [0, 1000])  # before the first token and after the last
    np.testing.assert_allclose(y, [9 / 4, 1.0])
    for record in records:
        record.pop("total_training_tokens", None)
    label, x, _ = curve_of(records, "val/bpb")
    assert label == "step"
    np.testing.assert_allclose(x, [0, 10])


def test_accuracy_bars(tmp_path):
    results = {
        "mid": {"ledger": {"accuracy": 0.5, "chance": 0.05, "n": 200}},
        "sft": {
            "ledger": {"accuracy": 1.0, "chance": 0.05, "n": 200},
            "facts": {"accuracy": 0.0, "chance": 0.1, "n": 200},
        },
    }
    path = plots.accuracy_bars(results, tmp_path / "accuracy.png")
    assert png_size(path)[0] >= 800


def test_wilson_interval():
    # Reference values: 95 of 100, and the bounds at none and all of 200.
    assert plots.wilson_interval(0.95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    low, high = plots.wilson_interval(0.0, 200)
    assert low == 0.0
    assert high == pytest.approx(1.96**2 / (200 + 1.96**2))
    assert plots.wilson_interval(1.0, 200)[1] == 1.0
    assert plots.wilson_interval(0.5, 0) == (0.0, 1.0)


def test_tick_labels_are_short():
    assert [plots._short(value) for value in (0, 500, 1500, 2e6, 1.5e9)] == ["0", "500", "1.5k", "2M", "1.5G"]
