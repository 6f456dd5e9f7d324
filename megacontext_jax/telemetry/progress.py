"""Console progress: nanochat's step line, its arithmetic, and one bar for everything else that takes a while.

Formatting is in pure functions; `StepMeter` turns measured steps into figures, `StepPrinter` and `Progress`
decide when to print. On a terminal lines are redrawn and coloured; anywhere else they are few and plain.
"""

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_DECIMAL_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
TERMINAL_INTERVAL_S = 0.1
TERMINAL_STEP_INTERVAL_S = 1.0
LOG_INTERVAL_S = 10.0


def colour_enabled(stream: TextIO) -> bool:
    """True on a real terminal, unless NO_COLOR is set (https://no-color.org) or the terminal is dumb."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def paint(text: str, style: str, stream: TextIO) -> str:
    """`text` in a style (bold, dim, red, green, yellow, blue, cyan) where `stream` shows colours."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if colour_enabled(stream) else text


def format_duration(seconds: float | None) -> str:
    """12s, 3m05s, 1h02m, 2d03h; "n/a" for None or a number that is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def format_quantity(value: float, unit: str = "") -> str:
    """A count for people: 950, 12.3k, 4.56M; with the unit "B" as 1.20 GB (decimal prefixes)."""
    for size, prefix in _DECIMAL_PREFIXES:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0
            number = f"{scaled:.{digits}f}"
            return f"{number} {prefix}B" if unit == "B" else f"{number}{prefix}{unit and ' ' + unit}"
    number = f"{value:.0f}" if value == round(value) else f"{value:.1f}"
    return f"{number} {unit}".rstrip()


def format_rate(per_second: float | None, unit: str = "") -> str:
    """12.3k rows/s, 4.50 MB/s, or 2.5 s/question below one a second; "n/a" when unknown."""
    if per_second is None or not math.isfinite(per_second) or per_second <= 0:
        return "n/a"
    if per_second < 1 and unit != "B":
        return f"{1 / per_second:.1f} s/{unit.removesuffix('s') or 'it'}"
    return f"{format_quantity(per_second, unit)}/s"


def format_mfu(mfu: float | None) -> str:
    return "n/a" if mfu is None else f"{mfu:.2f}"


def progress_line(
    label: str, done: float, total: float | None, seconds: float, *, unit: str = "", rate: float | None = None
) -> str:
    """One plain line: `label: 40% (4/10 shards), 2.00 shards/s, eta 3s`; without a total the count alone.

    `rate` (per second) replaces the average over `seconds`, e.g. when work was already done at the start.
    """
    if rate is None:
        rate = done / seconds if seconds > 0 else None
    if total:
        left = (total - done) / rate if rate else None
        amount = f"{100 * done / total:.0f}% ({_fraction(done, total, unit)})"
        return f"{label}: {amount}, {format_rate(rate, unit)}, eta {format_duration(left)}"
    return f"{label}: {format_quantity(done, unit)}, {format_rate(rate, unit)}, {format_duration(seconds)}"


def bar(done: float, total: float, width: int, ascii_only: bool = False) -> str:
    """A bar `width` characters wide, filled in proportion."""
    full, empty = ("#", "-") if ascii_only else ("━", "┄")
    filled = min(width, int(width * done / total)) if total else 0
    return full * filled + empty * (width - filled)


def _fraction(done: float, total: float, unit: str) -> str:
    if unit == "B":
        return f"{format_quantity(done, unit)} of {format_quantity(total, unit)}"
    return f"{done:,.0f}/{total:,.0f} {unit}".rstrip()


@dataclass(frozen=True)
class StepReport:
    """The figures of one training step; `loss` is smoothed, `mfu` a percentage or None where unknown."""

    step: int
    total_steps: int
    loss: float
    seconds: float
    tokens_per_second: float
    mfu: float | None
    total_seconds: float
    eta_seconds: float | None
    total_tokens: int
    total_flops: float | None
    lrm: float | None = None
    grad_norm: float | None = None

    def line(self, extra: str = "") -> str:
        """nanochat's step line; `extra` (e.g. "epoch: 1") goes before the total time."""
        percent = 100 * self.step / self.total_steps if self.total_steps else 100.0
        eta = "n/a" if self.eta_seconds is None else f"{self.eta_seconds / 60:.1f}m"
        parts = [
            f"step {self.step:05d}/{self.total_steps:05d} ({percent:.2f}%)",
            f"loss: {self.loss:.6f}",
            None if self.grad_norm is None else f"grad norm: {self.grad_norm:.4f}",
            None if self.lrm is None else f"lrm: {self.lrm:.2f}",
            f"dt: {1000 * self.seconds:.2f}ms",
            f"tok/sec: {self.tokens_per_second:,.0f}",
            f"mfu: {format_mfu(self.mfu)}",
            extra or None,
            f"total time: {self.total_seconds / 60:.2f}m",
            f"eta: {eta}",
        ]
        return " | ".join(part for part in parts if part is not None)

    def metrics(self) -> dict[str, float]:
        """The record to log under nanochat's keys (train/dt in seconds); unknown figures are left out."""
        values = {
            "total_training_flops": self.total_flops,
            "total_training_time": self.total_seconds,
            "total_training_tokens": self.total_tokens,
            "train/loss": self.loss,
            "train/lrm": self.lrm,
            "train/dt": self.seconds,
            "train/tok_per_sec": self.tokens_per_second,
            "train/mfu": self.mfu,
            "train/grad_norm": self.grad_norm,
        }
        return {key: value for key, value in values.items() if value is not None}


class StepMeter:
    """Smooths the loss, adds up time, tokens and FLOPs, and estimates the time left.

    The loss is a debiased moving average. Total training time leaves out the first steps of a run, which
    compile, and the first step after each resume. `get_state` belongs into the checkpoint: with it the loss
    after a resume is that of an uninterrupted run to the last bit, and the sums go on.
    """

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: int,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        untimed_steps: int = 10,
        beta: float = 0.9,
    ):
        """`peak_flops` is the sum over all devices, None where a device's peak is unknown."""
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.untimed_steps = untimed_steps
        self.beta = beta
        self._average_loss = 0.0
        self._count = 0
        self._total_seconds = 0.0
        self._total_tokens = 0
        self._total_flops = 0.0
        self._first_here = True
        self._pace: float | None = None  # seconds per step lately

    def update(
        self,
        step: int,
        loss: float,
        seconds: float,
        *,
        lrm: float | None = None,
        grad_norm: float | None = None,
        tokens: int | None = None,
    ) -> StepReport:
        """Takes one finished step in; `step` counts from 0, `seconds` is its wall time."""
        tokens = self.tokens_per_step if tokens is None else tokens
        self._count += 1
        self._average_loss = self.beta * self._average_loss + (1 - self.beta) * float(loss)
        self._total_tokens += tokens
        self._total_flops += tokens * (self.flops_per_token or 0)
        if not self._first_here:
            self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds
            if step >= self.untimed_steps:
                self._total_seconds += seconds
        self._first_here = False

        speed = tokens / seconds if seconds > 0 else 0.0
        mfu = None
        if self.flops_per_token and self.peak_flops:
            mfu = 100 * self.flops_per_token * speed / self.peak_flops
        left = max(0, self.total_steps - step - 1)
        return StepReport(
            step=step,
            total_steps=self.total_steps,
            loss=self._average_loss / (1 - self.beta**self._count),
            seconds=seconds,
            tokens_per_second=speed,
            mfu=mfu,
            total_seconds=self._total_seconds,
            eta_seconds=0.0 if not left else None if self._pace is None else left * self._pace,
            total_tokens=self._total_tokens,
            total_flops=self._total_flops if self.flops_per_token else None,
            lrm=None if lrm is None else float(lrm),
            grad_norm=None if grad_norm is None else float(grad_norm),
        )

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint must keep; JSON-able, and exact through JSON."""
        return {
            "average_loss": self._average_loss,
            "count": self._count,
            "total_seconds": self._total_seconds,
            "total_tokens": self._total_tokens,
            "total_flops": self._total_flops,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._average_loss = float(state["average_loss"])
        self._count = int(state["count"])
        self._total_seconds = float(state["total_seconds"])
        self._total_tokens = int(state["total_tokens"])
        # earlier checkpoints do not have it: then all steps were alike
        self._total_flops = float(state.get("total_flops", self._total_tokens * (self.flops_per_token or 0)))


class StepPrinter:
    """Prints step lines: the first few, the last, and between them one per interval (or every n-th step)."""

    def __init__(
        self,
        *,
        every: int | None = None,
        first: int = 3,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stdout
        self._every = every
        self._left = first
        self._clock = clock
        self._interval = TERMINAL_STEP_INTERVAL_S if is_terminal(self._stream) else LOG_INTERVAL_S
        self._next = -math.inf

    def show(self, report: StepReport, extra: str = "") -> bool:
        """Prints the report's line if it is due; True if it was."""
        now = self._clock()
        last = report.step + 1 >= report.total_steps
        due = report.step % self._every == 0 if self._every else now >= self._next
        if not (due or last or self._left > 0):
            return False
        self._left -= 1
        self._next = now + self._interval
        head, loss, rest = report.line(extra).split(" | ", 2)
        line = f"{paint(head, 'cyan', self._stream)} | {paint(loss, 'bold', self._stream)} | {rest}"
        print(line, file=self._stream, flush=True)
        return True


class Progress:
    """A progress bar for downloads, tokenising, evaluation: count, rate and time left; safe across threads.

    On a terminal one line is redrawn in place. Elsewhere a plain line appears every ten seconds. Leaving the
    `with` block prints the final line; leaving it by an exception prints how far the work came.
    """

    def __init__(
        self,
        label: str,
        total: float | None = None,
        *,
        unit: str = "",
        initial: float = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`initial` is work found done at the start (a resumed download); it does not count for the rate."""
        self.label = label
        self.total = total
        self.unit = unit
        self.done = initial
        self._initial = initial
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = is_terminal(self._stream)
        self._ascii = not (getattr(self._stream, "encoding", None) or "utf-8").lower().startswith("utf")
        self._lock = threading.Lock()
        self._start = clock()
        self._next = self._start if self._terminal else self._start + LOG_INTERVAL_S
        self._closed = False

    def update(self, amount: float = 1) -> None:
        with self._lock:
            self.done += amount
            if not self._closed and self._clock() >= self._next:
                self._draw()

    def line(self) -> str:
        """The current state as one plain line."""
        seconds = self._clock() - self._start
        return progress_line(
            self.label, self.done, self.total, seconds, unit=self.unit, rate=self._rate(seconds)
        )

    def close(self, failed: bool = False) -> None:
        """Prints the final line, once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            seconds = self._clock() - self._start
            amount = (
                _fraction(self.done, self.total, self.unit)
                if self.total
                else format_quantity(self.done, self.unit)
            )
            rate = format_rate(self._rate(seconds), self.unit)
            state = paint("stopped", "red", self._stream) + " at " if failed else ""
            text = f"{self.label}: {state}{amount} in {format_duration(seconds)} ({rate})"
            self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
            self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.close(failed=kind is not None)

    def _rate(self, seconds: float) -> float | None:
        return (self.done - self._initial) / seconds if seconds > 0 else None

    def _draw(self) -> None:
        if not self._terminal:
            self._next = self._clock() + LOG_INTERVAL_S
            self._stream.write(self.line() + "\n")
        else:
            self._next = self._clock() + TERMINAL_INTERVAL_S
            columns = shutil.get_terminal_size().columns
            text = self.line()
            room = min(30, columns - len(text) - 2)
            if self.total and room >= 8:
                text += " " + paint(bar(self.done, self.total, room, self._ascii), "green", self._stream)
            else:
                text = text[: columns - 1]
            self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
