"""Records of tokenised documents: what the packers read, and what becomes of rows of tokens.

A *record* is `{"record": k, "tokens": int32[N], "lengths": int32[D]}`, optionally with `"mask": uint8[N]`
(1 = train on this token): D documents end to end.
"""

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import grain
import numpy as np

from megacontext_jax.data.tokenizer import Tokenizer

IGNORE = -1

Record = dict[str, Any]
Batch = dict[str, np.ndarray]


def make_record(index: int, documents: Sequence[Sequence[int]], masks: Sequence | None = None) -> Record:
    """Joins tokenised documents (and their masks) into the record with number `index`."""
    lengths = np.fromiter(map(len, documents), np.int32, len(documents))
    total = int(lengths.sum())
    record = {
        "record": index,
        "tokens": np.fromiter(chain.from_iterable(documents), np.int32, total),
        "lengths": lengths,
    }
    if masks is not None:
        record["mask"] = np.fromiter(chain.from_iterable(masks), np.uint8, total)
    return record


def documents_of(record: Record) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The (tokens, mask) of each document, as views; the mask is None if the record has none."""
    ends = np.cumsum(record["lengths"])[:-1]
    tokens = np.split(record["tokens"], ends) if len(record["lengths"]) else []
    if "mask" not in record:
        return [(row, None) for row in tokens]
    return list(zip(tokens, np.split(record["mask"], ends), strict=True)) if tokens else []


def to_batch(rows_BS: np.ndarray, mask_BS: np.ndarray | None) -> dict[str, np.ndarray]:
    """Splits rows of T+1 tokens into inputs and shifted targets; a target whose mask is 0 becomes -1."""
    targets = rows_BS[:, 1:].copy()
    if mask_BS is not None:
        targets[mask_BS[:, 1:] == 0] = IGNORE
    return {"inputs": rows_BS[:, :-1].copy(), "targets": targets}


def right_padded(
    rows: Sequence[tuple[Sequence[int], Sequence[int] | None]], pad_id: int, width: int | None = None
) -> dict[str, np.ndarray]:
    """One conversation per row, (ids, mask or None) each, padded on the right with `pad_id`.

    `width` is T; None means the longest row's length minus one, as nanochat's first SFT did. Longer rows
    are cut.
    """
    if width is None:
        width = max(len(ids) for ids, _ in rows) - 1
    tokens = np.full((len(rows), width + 1), pad_id, np.int32)
    keep = np.zeros((len(rows), width + 1), np.uint8)
    for i, (ids, mask) in enumerate(rows):
        tokens[i, : len(ids)] = ids[: width + 1]
        keep[i, : len(ids)] = 1 if mask is None else mask[: width + 1]
    return to_batch(tokens, keep)


class PerThread:
    """A tokenizer of which each thread but the main one gets a copy of its own.

    tiktoken's pattern matcher is about 1.4 times as fast in the thread that used an encoding first as in any
    other, and training may well have encoded something before the reading thread starts.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._copies = threading.local()

    def __reduce__(self) -> tuple:
        return PerThread, (self._tokenizer,)

    def __call__(self) -> Tokenizer:
        if threading.current_thread() is threading.main_thread():
            return self._tokenizer
        if not hasattr(self._copies, "tokenizer"):
            self._copies.tokenizer = copy.copy(self._tokenizer)
        return self._copies.tokenizer


def _end_with_parent(*_: int) -> None:
    """For worker processes: without it they outlive a training process that was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class RecordDataset(grain.IterDataset):
    """The records of a map dataset in order, prepared ahead; the state is `{"next_record": k}`.

    `ahead` records are prepared by one thread, or by each of `num_workers` processes. The state does not
    depend on either, so a run may go on with other numbers.
    """

    def __init__(self, records: grain.MapDataset, *, ahead: int = 2, num_workers: int = 0):
        super().__init__(records)
        self.records = records
        self.ahead = ahead
        self.num_workers = num_workers

    def __iter__(self) -> grain.DatasetIterator:
        return _RecordIterator(self)


class _RecordIterator(grain.DatasetIterator):
    def __init__(self, dataset: RecordDataset):
        super().__init__()
        self._dataset = dataset
        self._next = 0
        self._source: grain.DatasetIterator | None = None

    def __next__(self) -> Record:
        if self._source is None:
            self._source = iter(self._from(self._next))
        record = next(self._source)
        self._next += 1
        return pickle.loads(record) if self._dataset.num_workers else record

    def _from(self, start: int) -> grain.IterDataset:
        ahead, workers = self._dataset.ahead, self._dataset.num_workers
        records = self._dataset.records[start:]
        if not workers:
            return records.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
        from absl import flags  # Grain hands absl's flags to its workers, also outside absl.app

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # As bytes, for Grain would put each array, however small, into a shared memory segment of its own.
        records = records.map(pickle.dumps)
        in_turn = grain.ReadOptions(
            num_threads=0, prefetch_buffer_size=0
        )  # a worker needs no thread beside it
        return records.to_iter_dataset(in_turn).mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead), _end_with_parent
        )

    def get_state(self) -> dict[str, int]:
        return {"next_record": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._stop()
        self._next = int(state["next_record"])

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
