import io
import json
import math
import threading

import pytest

from megacontext_jax.telemetry import progress
from megacontext_jax.telemetry.progress import Progress, StepMeter, StepPrinter, StepReport


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def colourful(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_durations():
    seconds = [0, 59.4, 60, 185, 3599.6, 3725, 86_400 * 2 + 3 * 3600, None, math.inf]
    texts = ["0s", "59s", "1m00s", "3m05s", "1h00m", "1h02m", "2d03h", "n/a", "n/a"]
    assert [progress.format_duration(value) for value in seconds] == texts


def test_quantities():
    cases = {
        (950, ""): "950",
        (12_345, ""): "12.3k",
        (4_560_000, ""): "4.56M",
        (999_999, ""): "1.00M",
        (2.5, "docs"): "2.5 docs",
        (1_200_000_000, "B"): "1.20 GB",
        (512, "B"): "512 B",
        (12_345, "rows"): "12.3k rows",
    }
    assert {case: progress.format_quantity(*case) for case in cases} == cases


def test_rates():
    assert progress.format_rate(12_345, "rows") == "12.3k rows/s"
    assert progress.format_rate(0.4, "questions") == "2.5 s/question"
    assert progress.format_rate(4.5e6, "B") == "4.50 MB/s"
    assert progress.format_rate(0) == progress.format_rate(None) == "n/a"


def test_step_line_is_nanochats():
    report = StepReport(
        step=4,
        total_steps=71_680,
        loss=5.4321987,
        seconds=1.5721,
        tokens_per_second=333_495.3,
        mfu=50.912,
        total_seconds=90.0,
        eta_seconds=360.0,
        total_tokens=5,
        total_flops=None,
        lrm=1.0,
        grad_norm=0.51239,
    )
    assert report.line() == (
        "step 00004/71680 (0.01%) | loss: 5.432199 | grad norm: 0.5124 | lrm: 1.00 | dt: 1572.10ms"
        " | tok/sec: 333,495 | mfu: 50.91 | total time: 1.50m | eta: 6.0m"
    )
    assert " | mfu: 50.91 | epoch: 1 | total time" in report.line("epoch: 1")


def test_unknown_figures_are_na_in_the_line_and_absent_in_the_record():
    meter = StepMeter(10, 1000)
    report = meter.update(0, 2.0, 0.5)
    assert "mfu: n/a" in report.line()
    assert "eta: n/a" in report.line()
    assert "grad norm" not in report.line()
    assert report.metrics().keys() == {
        "train/loss",
        "train/dt",
        "train/tok_per_sec",
        "total_training_time",
        "total_training_tokens",
    }


def test_meter_arithmetic():
    meter = StepMeter(20, 1000, flops_per_token=6e6, peak_flops=1e12, untimed_steps=2)
    reports = [meter.update(step, 4.0, 0.5, lrm=1.0, grad_norm=0.1) for step in range(5)]
    last = reports[-1]
    assert last.loss == pytest.approx(4.0)  # debiased: a constant stays itself from the first step on
    assert reports[0].loss == pytest.approx(4.0)
    assert last.tokens_per_second == 2000
    assert last.mfu == pytest.approx(1.2)  # 6e6 * 2000 / 1e12 = 1.2 %
    assert last.total_seconds == pytest.approx(1.5)  # steps 2, 3, 4
    assert last.eta_seconds == pytest.approx(15 * 0.5)
    assert last.metrics()["total_training_flops"] == 6e6 * 5000
    assert last.metrics()["train/grad_norm"] == 0.1
    assert meter.update(19, 4.0, 0.5).eta_seconds == 0


def test_first_step_does_not_spoil_the_estimate():
    meter = StepMeter(11, 1000)
    assert meter.update(0, 4.0, 60.0).eta_seconds is None
    assert meter.update(1, 4.0, 1.0).eta_seconds == pytest.approx(9.0)


def test_loss_moves_as_an_average():
    meter = StepMeter(10, 1)
    meter.update(0, 1.0, 1.0)
    assert meter.update(1, 2.0, 1.0).loss == pytest.approx((0.09 * 1.0 + 0.1 * 2.0) / 0.19)


def test_meter_resumes_to_the_last_bit():
    losses = [5.0 / (step + 1.7) for step in range(12)]
    whole = StepMeter(12, 100, untimed_steps=2)
    expected = [whole.update(step, loss, 0.1) for step, loss in enumerate(losses)]
    first = StepMeter(12, 100, untimed_steps=2)
    for step in range(7):
        first.update(step, losses[step], 0.1)
    second = StepMeter(12, 100, untimed_steps=2)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for step in range(7, 12):
        report = second.update(step, losses[step], 0.1)
        assert report.loss == expected[step].loss
        assert report.total_tokens == expected[step].total_tokens
    assert report.total_seconds == pytest.approx(expected[-1].total_seconds - 0.1)  # the step that compiled


def show_all(stream, steps, seconds_per_step, **options):
    clock, meter = Clock(), StepMeter(steps, 10)
    printer = StepPrinter(stream=stream, clock=clock, **options)
    for step in range(steps):
        printer.show(meter.update(step, 1.0, seconds_per_step))
        clock.now += seconds_per_step
    return [int(line.split("/")[0].split("step ")[1]) for line in stream.getvalue().splitlines()]


def test_step_lines_do_not_flood_a_log():
    assert show_all(io.StringIO(), 100, 1.0) == [0, 1, 2, *range(12, 99, 10), 99]
    assert show_all(Terminal(), 6, 1.0) == [0, 1, 2, 3, 4, 5]
    assert show_all(io.StringIO(), 10, 1.0, every=4, first=0) == [0, 4, 8, 9]


def test_colour_only_on_a_terminal(monkeypatch):
    assert progress.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert progress.paint("x", "red", io.StringIO()) == "x"
    plain = io.StringIO()
    show_all(plain, 3, 1.0)
    assert "\x1b" not in plain.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert progress.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert progress.paint("x", "red", Terminal()) == "x"


def test_progress_line():
    line = progress.progress_line("shards", 4, 10, 2.0, unit="shards")
    assert line == "shards: 40% (4/10 shards), 2 shards/s, eta 3s"
    line = progress.progress_line("shard_00001", 25e6, 100e6, 5.0, unit="B")
    assert line == "shard_00001: 25% (25.0 MB of 100 MB), 5.00 MB/s, eta 15s"
    assert progress.progress_line("docs", 500, None, 2.0) == "docs: 500, 250/s, 2s"
    assert progress.progress_line("docs", 0, 10, 0.0) == "docs: 0% (0/10), n/a, eta n/a"


def test_bar():
    assert progress.bar(1, 4, 8, ascii_only=True) == "##------"
    assert progress.bar(4, 4, 8) == "━" * 8
    assert len(progress.bar(9, 4, 8)) == 8


def test_log_gets_a_line_every_ten_seconds_and_a_last_one():
    stream, clock = io.StringIO(), Clock()
    with Progress("eval", 60, unit="questions", stream=stream, clock=clock) as bar:
        for _ in range(60):
            clock.now += 0.5
            bar.update()
    assert stream.getvalue().splitlines() == [
        "eval: 33% (20/60 questions), 2 questions/s, eta 20s",
        "eval: 67% (40/60 questions), 2 questions/s, eta 10s",
        "eval: 100% (60/60 questions), 2 questions/s, eta 0s",
        "eval: 60/60 questions in 30s (2 questions/s)",
    ]


def test_terminal_redraws_one_line_within_its_width():
    stream, clock = Terminal(), Clock()
    with Progress("eval", 10, stream=stream, clock=clock) as bar:
        for _ in range(10):
            clock.now += 1
            bar.update()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.count("\r") == 11
    assert "━" in text
    for drawn in text.replace("\x1b[K", "").replace("\x1b[32m", "").replace("\x1b[0m", "").split("\r"):
        assert len(drawn.rstrip("\n")) < 100


def test_resumed_work_does_not_count_for_the_rate():
    stream, clock = io.StringIO(), Clock()
    with Progress("file", 100, unit="B", initial=80, stream=stream, clock=clock) as bar:
        clock.now += 10
        bar.update(10)
        assert bar.line() == "file: 90% (90 B of 100 B), 1 B/s, eta 10s"
        bar.update(10)
    assert stream.getvalue().splitlines()[-1] == "file: 100 B of 100 B in 10s (2 B/s)"


def advance_and_fail(bar):
    bar.update(4)
    raise ZeroDivisionError


def test_failure_is_not_reported_as_done():
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Progress("file", 10, stream=stream) as bar:
        advance_and_fail(bar)
    assert "file: stopped at 4/10" in stream.getvalue()


def test_updates_from_many_threads_add_up():
    with Progress("n", 4000, stream=io.StringIO()) as bar:
        threads = [threading.Thread(target=lambda: [bar.update() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.done == 4000
