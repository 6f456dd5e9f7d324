"""Stopping well: the first SIGTERM or Ctrl-C asks for a save at the next step, the second ends at once."""

import os
import signal
import sys

import jax


class Stopper:
    """Context manager around a training loop; `requested(step)` is the signal that arrived, or None."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> int | None:
        """Agreed between processes, so that all of them stop after the same step."""
        if jax.process_count() == 1:
            return self.signal
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            return self.signal or signal.SIGTERM
        return None

    def _on_signal(self, number, frame):
        del frame
        name = signal.Signals(number).name
        if self.signal is not None:
            print(f"\n{name} again: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.signal = number
        print(f"\n{name}: saving after this step; once more to leave at once", file=sys.stderr, flush=True)
