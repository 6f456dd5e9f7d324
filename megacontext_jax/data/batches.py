"""Streams of batches as the training loop and the evaluation see them, whatever is in them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import grain
import numpy as np

from megacontext_jax.data.records import IGNORE, Batch
from megacontext_jax.errors import UserError

_CACHED_TOKENS = 2**24


class BatchStream:
    """An iterator of batches whose position is refused where it does not belong.

    `identity` holds what a position depends on; each of its keys has a sentence in `_MISMATCH`.
    """

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any]):
        self.identity = identity
        self._packer = iter(dataset)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        return next(self._packer)

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able: after `set_state` the next batch is what would have come next."""
        return {"identity": dict(self.identity), "packer": self._packer.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues at a position of `get_state`.

        Raises UserError if it belongs to other data, another tokenizer or another process count.
        """
        if not isinstance(state, Mapping) or not {"identity", "packer"} <= set(state):
            raise UserError("The checkpoint holds no data position; begin this stage anew with --fresh.")
        saved = state["identity"]
        for key, sentence in _MISMATCH.items():
            then, now = saved.get(key), self.identity.get(key)
            if then != now:
                remedy = ", or begin this stage anew with --fresh."
                raise UserError(sentence.format(then=then, now=now) + remedy)
        self._packer.set_state(state["packer"])

    def close(self) -> None:
        """Stops reading ahead; worker processes end."""
        self._packer.close()


_MISMATCH = {
    "process_count": "The saved data position is one of {then} processes, this run has {now}; start {then}",
    "process_index": "The saved data position is that of process {then}, this is process {now}; give each "
    "process its own",
    "packing": "The saved data position is one of packing {then!r}, this run packs {now!r}; choose that",
    "shuffle_seed": "The saved data position is one of shuffle seed {then}, this run has {now}; choose that",
    "max_tokens": "The saved data position is one of conversations cut at {then} tokens, this run cuts at "
    "{now}; choose the former",
    "data": "The data changed since the position was saved (digest {then}, now {now}); bring the former back",
    "tokenizer": "The tokenizer changed since the data position was saved (digest {then}, now {now}); bring "
    "the former back",
}


class ValBatches:
    """A finite sequence of batches, the same at each iteration and of the same length on each process.

    `make(i)` is process i's stream, from the beginning to its end. A process whose stream ends before the
    others' gives batches without targets, for the processes of a mesh have to take the same steps. Small
    sets are kept in memory after the first time.
    """

    def __init__(
        self, make: Callable[[int], BatchStream], limit: int, process_index: int = 0, process_count: int = 1
    ):
        self._make = make
        self._limit = limit
        self._index = process_index
        self._count = process_count
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Batch] = []
        size = 0
        for batch in self._all():
            size += batch["inputs"].size
            if size <= _CACHED_TOKENS:
                kept.append(batch)
            yield batch
        if size <= _CACHED_TOKENS:
            self._kept = kept

    def _all(self) -> Iterator[Batch]:
        own = wanted = 0
        for batch in self._some(self._index):
            own += 1
            yield batch
        if self._count == 1 or own == self._limit:
            return
        for other in set(range(self._count)) - {self._index}:
            for number, batch in enumerate(self._some(other), 1):
                if number > wanted:
                    wanted, shaped = number, batch
        for _ in range(wanted - own):
            yield {"inputs": shaped["inputs"], "targets": np.full_like(shaped["targets"], IGNORE)}

    def _some(self, process_index: int) -> Iterator[Batch]:
        stream = self._make(process_index)
        try:
            yield from islice(stream, self._limit)
        finally:
            stream.close()
