"""Stopping well: the first SIGTERM or Ctrl-C asks for a save at the next step, the second ends at once."""

import os
import signal
import sys

import jax
import numpy as np

AGREE_EVERY = 10  # steps between two agreements of several processes


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
        """The signal to stop for, agreed between processes so that all of them stop after the same step."""
        if jax.process_count() == 1:
            return self.signal
        if step % AGREE_EVERY:
            return None
        from jax.experimental import multihost_utils

        return int(multihost_utils.process_allgather(np.int32(self.signal or 0)).max()) or None

    def _on_signal(self, number, frame):
        del frame
        name = signal.Signals(number).name
        if self.signal is not None:
            print(f"\n{name} again: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.signal = number
        print(f"\n{name}: saving after this step; once more to leave at once", file=sys.stderr, flush=True)
