"""From records of tokenised documents to batches of fixed shape, as exactly resumable Grain iterators.

Packers read records from a parent whose state is `{"next_record": k}` and keep no token in their own state:
they note *which* documents are open and have them tokenised again. Batches are `{"inputs": int32[B,T],
"targets": int32[B,T]}`; a target of -1 is ignored. When a finite parent ends, the last batch is filled up
with padding and ignored targets.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from megacontext_jax.data.records import IGNORE, Batch, Record, documents_of, right_padded, to_batch
from megacontext_jax.errors import UserError

Recover = Callable[[int, Sequence[int]], list[tuple[np.ndarray, np.ndarray | None]]]
"""(record, documents of it) -> their (tokens, mask), as the parent would deliver them."""


class BestFitBuffer:
    """Documents that wait for a place. Lookups by length are O(log n); ties go to the first arrival."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []  # (length, -arrival), sorted
        self._items: dict[int, Any] = {}  # by arrival, hence in order of arrival
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, item: Any) -> None:
        insort(self._keys, (length, -self._arrivals))
        self._items[self._arrivals] = item
        self._arrivals += 1

    def take_largest(self, limit: int) -> Any | None:
        """Removes and returns the longest item of at most `limit` tokens; None if all are longer."""
        return self._take(bisect_right(self._keys, (limit, 1)) - 1)

    def take_shortest(self) -> Any | None:
        """Removes and returns the shortest item; None if there is none."""
        if not self._keys:
            return None
        return self._take(bisect_right(self._keys, (self._keys[0][0], 1)) - 1)

    def items(self) -> list[Any]:
        """What waits, in order of arrival."""
        return list(self._items.values())

    def _take(self, position: int) -> Any | None:
        if position < 0:
            return None
        _, arrival = self._keys.pop(position)
        return self._items.pop(-arrival)


def count_padded_rows(lengths: Sequence[int], capacity: int, buffer_size: int) -> int:
    """How many rows of `capacity` tokens best fit without cropping makes of documents of these lengths.

    None may be longer than `capacity`.
    """
    buffer, coming, rows, space = BestFitBuffer(), iter(lengths), 0, 0
    while True:
        while len(buffer) < buffer_size and (length := next(coming, None)) is not None:
            buffer.add(length, length)
        if not len(buffer):
            return rows
        placed = buffer.take_largest(space)
        if placed is None:
            rows, space = rows + 1, capacity
        else:
            space -= placed


class _Packer(grain.DatasetIterator):
    """What the packers share: reading records, and noticing that a whole epoch has nothing in it.

    `next_record` is the next one to read, `current_record` the place to tell people, `skipped` counts the
    records without a document.
    """

    def __init__(self, parent: grain.DatasetIterator, dataset: "_PackedDataset"):
        super().__init__(parent)
        self._dataset = dataset
        self._barren = 0
        self.next_record: int = parent.get_state()["next_record"]
        self.skipped = 0

    @property
    def current_record(self) -> int:
        return self.next_record

    def _read(self) -> Record | None:
        """The next record that holds a document, None at the end; those without are counted in `skipped`."""
        while True:
            record = next(self._parent, None)
            if record is None:
                return None
            self.next_record = int(record["record"]) + 1
            if len(record["lengths"]):
                self._barren = 0
                return record
            self.skipped += 1
            self._barren += 1
            if self._barren >= self._dataset.epoch_records:
                raise UserError(self._dataset.nothing_message)

    def _seek(self, record: int) -> None:
        self._parent.set_state({"next_record": record})
        self.next_record = record
        self._barren = 0


class ConcatIterator(_Packer):
    """nanochat's token stream: B*T+1 tokens per batch; the last one is only a target and is not used again.

    State: the record and the offset in its tokens at which the next batch begins.
    """

    def __init__(self, parent: grain.DatasetIterator, dataset: "ConcatDataset"):
        super().__init__(parent, dataset)
        self._open: deque[Record] = deque()
        self._offset = 0  # in the tokens of the first open record, or of the next one if none is open
        self._available = 0

    def __next__(self) -> Batch:
        rows, length = self._dataset.batch_size, self._dataset.seq_len
        needed = rows * length + 1
        while self._available < needed and (record := self._read()) is not None:
            self._available += len(record["tokens"]) - (0 if self._open else self._offset)
            self._open.append(record)
        if self._available < 2:  # a single token predicts nothing
            raise StopIteration
        tokens, keep = np.full(needed, self._dataset.pad_id, np.int32), np.zeros(needed, np.uint8)
        filled = 0
        while filled < needed and self._open:
            record = self._open[0]
            end = min(len(record["tokens"]), self._offset + needed - filled)
            piece = slice(filled, filled + end - self._offset)
            tokens[piece] = record["tokens"][self._offset : end]
            keep[piece] = record["mask"][self._offset : end] if self._dataset.use_mask else 1
            filled, self._offset = piece.stop, end
            if end == len(record["tokens"]):
                self._open.popleft()
                self._offset = 0
        self._available -= filled
        targets = np.where(keep[1:], tokens[1:], IGNORE).astype(np.int32)
        return {"inputs": tokens[:-1].reshape(rows, length), "targets": targets.reshape(rows, length)}

    @property
    def current_record(self) -> int:
        """The record at whose tokens the next batch begins."""
        return int(self._open[0]["record"]) if self._open else self.next_record

    def get_state(self) -> dict[str, Any]:
        return {"record": self.current_record, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._open.clear()
        self._available = 0
        self._offset = int(state["offset"])
        self._seek(int(state["record"]))


class BestFitIterator(_Packer):
    """Rows of T+1 tokens, each filled with the longest waiting document that fits, and so on.

    When none fits, `crop` fills the row with the beginning of the shortest one and drops the rest of it
    (nanochat's pretraining), while padding fills it with `pad_id` and ignored targets (its SFT). Before each
    placement the buffer is filled to at least `buffer_size` documents, `chunk_docs` of a record at a time.

    State: the next document to read, the waiting documents by number in order of arrival, three counters.
    """

    def __init__(self, parent: grain.DatasetIterator, dataset: "BestFitDataset"):
        super().__init__(parent, dataset)
        self._buffer = BestFitBuffer()
        self._pending: list = []  # the documents of the record being read
        self._pending_record = -1
        self._pending_next = 0
        self.placed_docs = 0
        self.placed_tokens = 0
        self.dropped_tokens = 0

    @property
    def kept_share(self) -> float:
        """The share of the tokens of used documents that reached a row; 1 before the first batch."""
        seen = self.placed_tokens + self.dropped_tokens
        return self.placed_tokens / seen if seen else 1.0

    def __next__(self) -> Batch:
        dataset = self._dataset
        width = dataset.seq_len + 1
        rows = np.full((dataset.batch_size, width), dataset.pad_id, np.int32)
        keep = np.zeros((dataset.batch_size, width), np.uint8)
        for i in range(dataset.batch_size):
            filled = 0
            while filled < width:
                self._refill()
                space = width - filled
                chosen = self._buffer.take_largest(space)
                if chosen is None:
                    chosen = self._buffer.take_shortest() if dataset.crop else None
                    if chosen is None:
                        break
                _, tokens, mask = chosen
                used = min(len(tokens), space)
                rows[i, filled : filled + used] = tokens[:used]
                keep[i, filled : filled + used] = 1 if mask is None else mask[:used]
                filled += used
                self.placed_docs += 1
                self.placed_tokens += used
                self.dropped_tokens += len(tokens) - used
            if i == filled == 0:
                raise StopIteration
        return to_batch(rows, keep)

    @property
    def current_record(self) -> int:
        """The record of the last refill, which is the place nanochat reports."""
        return max(0, self.next_record - 1)

    def _refill(self) -> None:
        while len(self._buffer) < self._dataset.buffer_size:
            if self._pending_next >= len(self._pending):
                record = self._read()
                if record is None:
                    return
                self._pending, self._pending_next = documents_of(record), 0
                self._pending_record = int(record["record"])
            end = min(len(self._pending), self._pending_next + self._dataset.chunk_docs)
            for number in range(self._pending_next, end):
                self._wait(self._pending_record, number, *self._pending[number])
            self._pending_next = end

    def _wait(self, record: int, number: int, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        # Copies, because a view of one long waiting document would keep its whole record in memory.
        self._buffer.add(
            len(tokens), ((record, number), tokens.copy(), None if mask is None else mask.copy())
        )

    def get_state(self) -> dict[str, Any]:
        waiting: list[list] = []  # [record, [documents]], both ascending: that is the order of arrival
        for (record, number), _, _ in self._buffer.items():
            if not waiting or waiting[-1][0] != record:
                waiting.append([record, []])
            waiting[-1][1].append(number)
        unfinished = self._pending_next < len(self._pending)
        return {
            "record": self._pending_record if unfinished else self.next_record,
            "document": self._pending_next if unfinished else 0,
            "waiting": waiting,
            "counters": [self.placed_docs, self.placed_tokens, self.dropped_tokens, self.skipped],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._buffer = BestFitBuffer()
        for record, numbers in state["waiting"]:
            documents = self._dataset.recover(record, numbers)
            for number, (tokens, mask) in zip(numbers, documents, strict=True):
                self._wait(record, number, tokens, mask)
        self._pending, self._pending_record, self._pending_next = [], -1, 0
        self._seek(int(state["record"]))
        if state["document"]:
            record = self._read()
            self._pending, self._pending_record = documents_of(record), int(record["record"])
            self._pending_next = int(state["document"])
        self.placed_docs, self.placed_tokens, self.dropped_tokens, self.skipped = state["counters"]


class PaddedIterator(_Packer):
    """One document per row, padded on the right (nanochat's first SFT). State: the next record."""

    def __next__(self) -> Batch:
        rows: list = []
        while len(rows) < self._dataset.batch_size and (record := self._read()) is not None:
            rows.extend(documents_of(record))
        if not rows:
            raise StopIteration
        rows += [((), ())] * (self._dataset.batch_size - len(rows))
        return right_padded(rows, self._dataset.pad_id, self._dataset.seq_len)

    def get_state(self) -> dict[str, Any]:
        return {"record": self.next_record}

    def set_state(self, state: dict[str, Any]) -> None:
        self._seek(int(state["record"]))


class _PackedDataset(grain.IterDataset):
    """`epoch_records` records without any document in a row raise UserError(`nothing_message`)."""

    _iterator: type[_Packer]

    def __init__(
        self,
        parent: grain.IterDataset,
        batch_size: int,
        seq_len: int,
        *,
        pad_id: int,
        epoch_records: int,
        nothing_message: str,
    ):
        super().__init__(parent)
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.epoch_records = epoch_records
        self.nothing_message = nothing_message

    def __iter__(self) -> _Packer:
        return self._iterator(iter(self._parent), self)


class ConcatDataset(_PackedDataset):
    """Batches cut from the token stream; `use_mask` makes targets outside the records' masks -1."""

    _iterator = ConcatIterator

    def __init__(self, *args: Any, use_mask: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.use_mask = use_mask


class BestFitDataset(_PackedDataset):
    """Best-fit rows, cropped or padded; see BestFitIterator."""

    _iterator = BestFitIterator

    def __init__(
        self,
        *args: Any,
        recover: Recover,
        crop: bool,
        buffer_size: int,
        chunk_docs: int = 1,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.recover = recover
        self.crop = crop
        self.buffer_size = buffer_size
        self.chunk_docs = chunk_docs


class PaddedDataset(_PackedDataset):
    """One conversation per row of T tokens; each record must hold one document."""

    _iterator = PaddedIterator
