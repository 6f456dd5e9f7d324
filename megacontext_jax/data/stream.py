"""The pretraining stream: parquet row groups, tokenised ahead by Grain, packed as nanochat packs.

    row groups of this process, repeated -> tokenise (thread or worker processes) -> pack -> batches

The record of the pipeline is one row group, so a position is a record number and an offset, whatever the
number of workers. Order: files as given, the row groups r, r+W, r+2W, ... of each for process r of W.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np
import xxhash

from megacontext_jax.data.batches import BatchStream, ValBatches
from megacontext_jax.data.packing import BestFitDataset, ConcatDataset
from megacontext_jax.data.records import PerThread, Record, RecordDataset, make_record
from megacontext_jax.data.rowgroups import RowGroupSource, check_shards
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError

PACKINGS = ("concat", "best_fit")
BUFFER_DOCS = 1000  # documents a best-fit row chooses from
CHUNK_DOCS = 128  # documents nanochat tokenises at once, hence the step of its refills


class Corpus:
    """The row groups of text files and who reads which of them."""

    def __init__(self, paths: Sequence[str | Path]):
        self.source = RowGroupSource(paths)
        self.paths = self.source.paths
        infos = check_shards(self.paths)
        self.counts = [info.groups for info in infos]
        self.starts = list(accumulate(self.counts, initial=0))
        facts = [
            (path.name, path.stat().st_size, *info) for path, info in zip(self.paths, infos, strict=True)
        ]
        self.digest = xxhash.xxh3_64_hexdigest(repr(facts).encode())

    def share(self, process_index: int, process_count: int) -> list[int]:
        """The row groups (numbered over all files) of one process.

        Every W-th of each file, as nanochat; where no file has W row groups, every W-th of the corpus.
        Raises UserError if there are fewer row groups than processes.
        """
        if not 0 <= process_index < process_count:
            raise UserError(f"There is no process {process_index} among {process_count}.")
        total = len(self.source)
        if total < process_count:
            raise UserError(
                f"{self.paths[0].parent} has {total} row groups for {process_count} processes; write the "
                f"shards with smaller row groups, or use fewer processes."
            )
        if max(self.counts) < process_count:
            return list(range(process_index, total, process_count))
        return [
            start + group
            for start, groups in zip(self.starts, self.counts, strict=False)
            for group in range(process_index, groups, process_count)
        ]


class _Tokenise:
    """(record, row group) -> record: every document as bos + its tokens."""

    def __init__(self, source: RowGroupSource, tokenizer: Tokenizer):
        self.source = source
        self.tokenizer = PerThread(tokenizer)

    def __call__(self, record: int, group: int) -> Record:
        return make_record(record, self._encode(self.source[group]))

    def some(self, group: int, numbers: Sequence[int]) -> list[tuple[np.ndarray, None]]:
        """The tokens of some documents of a row group."""
        texts = self.source[group]
        return [(np.array(row, np.int32), None) for row in self._encode([texts[i] for i in numbers])]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokenizer = self.tokenizer()
        return tokenizer.encode(texts, prepend=tokenizer.bos, num_threads=1)


class PretrainStream(BatchStream):
    """Batches of the pretraining text; see `pretrain_stream`. `repeat=False` ends after one pass."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        batch_size: int,
        seq_len: int,
        *,
        packing: str = "concat",
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        shuffle_seed: int | None = None,
        buffer_size: int = BUFFER_DOCS,
        chunk_docs: int = CHUNK_DOCS,
        repeat: bool = True,
    ):
        if packing not in PACKINGS:
            raise UserError(f"There is no packing {packing!r} of text; choose one of {', '.join(PACKINGS)}.")
        self.corpus = corpus
        order = grain.MapDataset.source(corpus.share(process_index, process_count))
        if shuffle_seed is not None:  # one order of the whole corpus per epoch, dealt out to the processes
            order = grain.MapDataset.source(range(len(corpus.source))).seed(shuffle_seed).shuffle()
            order = order[process_index::process_count]
        self._epoch_records = len(order)
        self._order = order.repeat() if repeat else order
        tokenise = _Tokenise(corpus.source, tokenizer)
        records = RecordDataset(self._order.map_with_index(tokenise), num_workers=num_workers)
        common = {
            "pad_id": tokenizer.bos,
            "epoch_records": self._epoch_records,
            "nothing_message": f"There is no document in {corpus.paths[0].parent}; check the data folder.",
        }
        if packing == "concat":
            dataset = ConcatDataset(records, batch_size, seq_len, **common)
        else:
            dataset = BestFitDataset(
                records,
                batch_size,
                seq_len,
                recover=lambda record, numbers: tokenise.some(self._order[record], numbers),
                crop=True,
                buffer_size=buffer_size,
                chunk_docs=chunk_docs,
                **common,
            )
        super().__init__(
            dataset,
            {
                "packing": packing,
                "process_index": process_index,
                "process_count": process_count,
                "shuffle_seed": shuffle_seed,
                "data": corpus.digest,
                "tokenizer": tokenizer.digest,
            },
        )

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As of every stream; besides a `{"place": {"file", "row_group", "epoch"}}` to begin at."""
        if isinstance(state, Mapping) and "place" in state:
            self.seek(**state["place"])
        else:
            super().set_state(state)

    def position(self) -> dict[str, Any]:
        """How far it is: `epoch` (from 1), `file` (its number), `name`, `row_group`.

        For "concat" where the next batch begins, for "best_fit" where its buffer was last refilled from.
        """
        record = self._packer.current_record
        file, group = self.corpus.source.locate(self._order[record])
        return {
            "epoch": record // self._epoch_records + 1,
            "file": file,
            "name": self.corpus.paths[file].name,
            "row_group": group,
        }

    def seek(self, file: int, row_group: int, epoch: int = 1) -> None:
        """Goes to this process's first row group at or after a place, with nothing buffered.

        nanochat resumes at `row_group + 1` of the position it saved. Only for streams in file order.
        """
        if self.identity["shuffle_seed"] is not None:
            raise UserError("A shuffled stream knows no place by file and row group; leave out the seed.")
        if not (0 <= file < len(self.corpus.counts) and row_group >= 0 and epoch >= 1):
            raise UserError(
                f"The checkpoint's place in the data is epoch {epoch}, file {file}, row group {row_group}, and "
                f"{self.corpus.paths[0].parent} has {len(self.corpus.counts)} training files; bring the data it was "
                "trained on, or import it without its place (--no-place)."
            )
        groups = [self._order[i] for i in range(self._epoch_records)]
        passed = int(np.searchsorted(groups, self.corpus.starts[file] + row_group))
        record = (epoch - 1) * self._epoch_records + passed
        nothing = {"offset": 0, "document": 0, "waiting": [], "counters": [0, 0, 0, 0]}
        self._packer.set_state({"record": record, **nothing})

    @property
    def kept_share(self) -> float:
        """The share of tokens that reached a row: 1 for "concat", less for "best_fit"."""
        return getattr(self._packer, "kept_share", 1.0)


def pretrain_stream(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    batch_size: int,
    seq_len: int,
    *,
    packing: str = "concat",
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    shuffle_seed: int | None = None,
    state: Mapping[str, Any] | None = None,
    buffer_size: int = BUFFER_DOCS,
    chunk_docs: int = CHUNK_DOCS,
) -> PretrainStream:
    """The endless stream of `{"inputs", "targets"}` int32[batch_size, seq_len] of parquet shards.

    `packing`: "concat" is nanochat's classic token stream, "best_fit" its row packing of 2026, where every
    row starts with bos and is cropped (it chooses among `buffer_size` documents, refilled `chunk_docs` at a
    time). `num_workers` 0 tokenises in a thread, else in that many processes; the batches are the same.
    `shuffle_seed` None keeps the order of the files, else the row groups are shuffled anew each epoch.
    `state` continues where an earlier stream's `get_state()` was taken.

    Raises UserError for an empty corpus, too many processes, or a state that does not fit.
    """
    stream = PretrainStream(
        Corpus(paths),
        load_tokenizer(tokenizer),
        batch_size,
        seq_len,
        packing=packing,
        process_index=process_index,
        process_count=process_count,
        num_workers=num_workers,
        shuffle_seed=shuffle_seed,
        buffer_size=buffer_size,
        chunk_docs=chunk_docs,
    )
    if state is not None:
        stream.set_state(state)
    return stream


def val_batches(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    batch_size: int,
    seq_len: int,
    *,
    max_tokens: int,
    packing: str = "concat",
    process_index: int = 0,
    process_count: int = 1,
    **packing_options: int,
) -> ValBatches:
    """Batches for evaluation: `paths` once from the beginning, or its first `max_tokens` over all processes.

    The last batch is filled up with bos and ignored targets. Keep the result: iterating it again is free.
    """
    corpus, tokenizer = Corpus(paths), load_tokenizer(tokenizer)

    def make(index: int) -> PretrainStream:
        return PretrainStream(
            corpus,
            tokenizer,
            batch_size,
            seq_len,
            packing=packing,
            process_index=index,
            process_count=process_count,
            repeat=False,
            **packing_options,
        )

    limit = max(1, max_tokens // (batch_size * seq_len * process_count))
    make(process_index).close()  # a wrong argument is reported here, not at the first evaluation
    return ValBatches(make, limit, process_index, process_count)


def load_tokenizer(tokenizer: Tokenizer | str | Path) -> Tokenizer:
    """The tokenizer itself, or the one saved in a folder."""
    return Tokenizer.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
