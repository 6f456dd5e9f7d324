"""scripts.base_train in one process that reads what two processes would; run by test_loop_mesh.py.

Processes read different parts of the text, so a run of two is compared with one process that puts the rows
of both parts together.
"""

import sys

import numpy as np

from megacontext_jax.train import stages
from scripts.base_train import main

PROCESSES = 2
_stream, _batches = stages.pretrain_stream, stages.val_batches


class Joined:
    """The streams of all processes, row by row of one batch."""

    def __init__(self, parts):
        self._parts = list(parts)

    def __iter__(self):
        for rows in zip(*self._parts, strict=True):
            yield {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}

    def __next__(self):
        return next(iter(self))

    def get_state(self):
        return {"parts": [part.get_state() for part in self._parts]}


def split(make):
    def joined(paths, tokenizer, rows, seq_len, *, process_index, process_count, **options):
        assert process_count == 1
        return Joined(
            make(
                paths,
                tokenizer,
                rows // PROCESSES,
                seq_len,
                process_index=index,
                process_count=PROCESSES,
                **options,
            )
            for index in range(PROCESSES)
        )

    return joined


if __name__ == "__main__":
    stages.pretrain_stream, stages.val_batches = split(_stream), split(_batches)
    sys.exit(main(sys.argv[1:]))
