"""Conversations for mid-training and SFT: reading them, and three ways to render them as batches.

"stream" concatenates rendered conversations and cuts batches from the tokens (nanochat's mid-training);
"pad" fills rows with whole conversations by best fit and pads the rest (its SFT since 2026);
"rows" has one conversation per row (its first SFT). All three give `{"inputs", "targets"}` int32[B,T].

Order: position g of an endless sequence is conversation g mod n of epoch g div n, and process r of W takes
g = r, r+W, r+2W, ...
"""

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megacontext_jax.data.batches import BatchStream, ValBatches
from megacontext_jax.data.packing import BestFitDataset, ConcatDataset, PaddedDataset, count_padded_rows
from megacontext_jax.data.records import PerThread, Record, RecordDataset, documents_of, make_record
from megacontext_jax.data.rowgroups import check_shard
from megacontext_jax.data.stream import load_tokenizer
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError

PACKINGS = ("stream", "pad", "rows")
BUFFER_CONVERSATIONS = 100
_AHEAD = 64  # conversations rendered before they are asked for
_SAMPLE = 2000  # conversations rendered to estimate an epoch's tokens
_PART_KINDS = ("text", "python", "python_output")

Conversation = dict[str, Any]


class Source(Protocol):
    """What a stream reads from: conversations by number. A `digest` tells two sources apart."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class ConversationSource:
    """The conversations of `.parquet` files (column `messages`) and `.jsonl` files, in file order.

    A line of `.jsonl` is `{"messages": [...]}` or the bare list. Files are checked when the source is made
    and held in memory (as Arrow or lines of text) from their first use; pickling carries only the names.
    Raises UserError naming file and row for a conversation that is not well formed.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = [Path(path) for path in paths]
        if not self.paths:
            raise UserError("There are no conversation files to read; check the data folder.")
        self._files: dict[int, Any] = {}
        counts = [self._count(i) for i in range(len(self.paths))]
        self._ends = list(accumulate(counts))
        facts = [(path.name, path.stat().st_size, n) for path, n in zip(self.paths, counts, strict=True)]
        self.digest = xxhash.xxh3_64_hexdigest(repr(facts).encode())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (self._ends[file - 1] if file else 0)
        path, rows = self.paths[file], self._rows(file)
        if path.suffix == ".parquet":
            return checked(rows[row].as_py(), f"{path}, row {row}")
        number, line = rows[row]
        return checked(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")

    def _count(self, file: int) -> int:
        path = self.paths[file]
        return check_shard(path, "messages").rows if path.suffix == ".parquet" else len(self._rows(file))

    def _rows(self, file: int) -> Any:
        if file not in self._files:
            path = self.paths[file]
            self._files[file] = _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)
        return self._files[file]


def checked(found: Any, where: str) -> Conversation:
    """`found` as `{"messages": [...]}`: an optional system message, then user, assistant, user, ...

    Contents are strings, the assistant's also lists of `{"type": text|python|python_output, "text": str}`.
    Raises UserError beginning with `where`.
    """
    messages = found.get("messages") if isinstance(found, Mapping) else found
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f'{where} is not a conversation: it needs "messages", a list of messages.')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UserError(f'{where}: message {i} needs "role" and "content".')
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) < first + 2:
        raise UserError(f"{where}: a conversation needs a user message and an answer.")
    for i, message in enumerate(messages):
        wanted = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if message["role"] != wanted:
            raise UserError(f"{where}: message {i} has the role {message['role']!r}, {wanted!r} is due.")
        if not _is_content(message["content"], wanted):
            raise UserError(f"{where}: the content of message {i} is neither a string nor valid parts.")
    return found if isinstance(found, dict) else {"messages": list(messages)}


def _is_content(content: Any, role: str) -> bool:
    if role != "assistant" or isinstance(content, str):
        return isinstance(content, str)
    return isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") in _PART_KINDS and isinstance(part.get("text"), str)
        for part in content
    )


def _read_parquet(path: Path) -> pa.ChunkedArray:
    try:
        return pq.read_table(path, columns=["messages"], use_threads=False).column("messages")
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or incomplete; make or download it again.") from error


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line) of each line that is not blank."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"The conversation file {path} is missing; restore it or make it again.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The conversation file {path} cannot be read as UTF-8 text: {error}.") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"The conversation file {path} is empty; delete it.")
    return lines


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); correct it.") from error


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)  # epoch 0: default_rng(seed)


class _Render:
    """(record, position g) -> record of one rendered conversation, or of none if nothing in it is trained."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, seed: int | None, max_tokens: int | None, mask: bool
    ):
        self.source = source
        self.tokenizer = PerThread(tokenizer)
        self.seed = seed
        self.max_tokens = max_tokens
        self.mask = mask

    def __call__(self, record: int, position: int) -> Record:
        epoch, index = divmod(position, len(self.source))
        if self.seed is not None:
            index = int(_permutation(self.seed, epoch, len(self.source))[index])
        ids, mask = self.ids_and_mask(index)
        if not self.mask:
            return make_record(record, [ids])
        if not any(mask):
            return make_record(record, [], [])
        return make_record(record, [ids], [mask])

    def ids_and_mask(self, index: int) -> tuple[list[int], list[int]]:
        """Conversation `index` of the source, rendered."""
        return self.tokenizer().render_conversation(self.source[index], max_tokens=self.max_tokens)


class ConversationStream(BatchStream):
    """Batches of conversations; see `conversation_stream`. `repeat=False` ends after one pass."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        batch_size: int,
        seq_len: int,
        *,
        packing: str,
        mask: bool | None = None,
        shuffle: bool = True,
        seed: int = 42,
        max_tokens: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        buffer_size: int = BUFFER_CONVERSATIONS,
        repeat: bool = True,
    ):
        if packing not in PACKINGS:
            raise UserError(
                f"There is no packing {packing!r} of conversations; choose {', '.join(PACKINGS)}."
            )
        if not 0 <= process_index < process_count:
            raise UserError(f"There is no process {process_index} among {process_count}.")
        if len(source) < process_count:
            raise UserError(f"{len(source)} conversations are too few for {process_count} processes.")
        self.source = source
        self.seq_len = seq_len
        self.packing = packing
        self.buffer_size = buffer_size
        self._share = (process_index, process_count)
        mask = packing != "stream" if mask is None else mask
        if packing != "stream":  # a longer conversation could never be placed
            max_tokens = min(max_tokens or seq_len + 1, seq_len + 1)
        self.render = _Render(source, tokenizer, seed if shuffle else None, max_tokens, mask)
        endless = range(sys.maxsize if repeat else len(source))
        self._order = grain.MapDataset.source(endless)[process_index::process_count]
        records = RecordDataset(
            self._order.map_with_index(self.render), ahead=_AHEAD, num_workers=num_workers
        )
        common = {
            "pad_id": tokenizer.special("<|assistant_end|>") if packing == "rows" else tokenizer.bos,
            "epoch_records": -(-len(source) // process_count),
            "nothing_message": f"In none of the {len(source)} conversations the assistant has a token among "
            f"the first {max_tokens}; use a larger --max-seq-len or other conversations.",
        }
        if packing == "stream":
            dataset = ConcatDataset(records, batch_size, seq_len, use_mask=mask, **common)
        elif packing == "rows":
            dataset = PaddedDataset(records, batch_size, seq_len, **common)
        else:
            dataset = BestFitDataset(
                records,
                batch_size,
                seq_len,
                recover=self._recover,
                crop=False,
                buffer_size=buffer_size,
                **common,
            )
        super().__init__(
            dataset,
            {
                "packing": packing,
                "process_index": process_index,
                "process_count": process_count,
                "shuffle_seed": self.render.seed,
                "max_tokens": max_tokens,
                "data": source.digest,
                "tokenizer": tokenizer.digest,
            },
        )

    def _recover(self, record: int, numbers: Sequence[int]) -> list:
        return documents_of(self.render(record, self._order[record]))

    def progress(self) -> dict[str, Any]:
        """`progress` = conversations used / their number (1 after the first epoch), `last_step` = it is over,
        `epoch` = that of the next conversation to read, from 1. All count those of every process.
        """
        n, packer = len(self.source), self._packer
        if self.packing == "pad":  # conversations that wait in the buffer are read, but not used
            used, read = packer.placed_docs + packer.skipped, packer.next_record
        else:
            used = read = packer.current_record
        index, count = self._share
        used, read = index + used * count, index + read * count
        return {"progress": used / n, "last_step": used >= n, "epoch": read // n + 1}


def conversation_stream(
    source: Source,
    tokenizer: Tokenizer | str | Path,
    batch_size: int,
    seq_len: int,
    *,
    packing: str = "pad",
    mask: bool | None = None,
    shuffle: bool = True,
    seed: int = 42,
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    buffer_size: int = BUFFER_CONVERSATIONS,
    state: Mapping[str, Any] | None = None,
) -> ConversationStream:
    """The endless stream of `{"inputs", "targets"}` int32[batch_size, seq_len] of conversations.

    `packing` is "stream", "pad" or "rows" (see the module). With `mask` only the assistant's tokens are
    targets, without it every token is; None = as nanochat: not in a "stream", else yes. `shuffle` takes a new
    permutation for each epoch, drawn from `seed`; otherwise the order of `source` is kept, for a curriculum
    or a source that is mixed already. Conversations are cut to `max_tokens` (None: whole in a "stream";
    never more than T+1 otherwise, so that each fits a row); those left without an assistant's token are
    passed over. `state` continues where an earlier stream's `get_state()` was taken.
    """
    stream = ConversationStream(
        source,
        load_tokenizer(tokenizer),
        batch_size,
        seq_len,
        packing=packing,
        mask=mask,
        shuffle=shuffle,
        seed=seed,
        max_tokens=max_tokens,
        process_index=process_index,
        process_count=process_count,
        num_workers=num_workers,
        buffer_size=buffer_size,
    )
    if state is not None:
        stream.set_state(state)
    return stream


def conversation_val_batches(
    source: Source,
    tokenizer: Tokenizer | str | Path,
    batch_size: int,
    seq_len: int,
    *,
    max_tokens: int,
    packing: str = "pad",
    mask: bool | None = None,
    process_index: int = 0,
    process_count: int = 1,
    cut: int | None = None,
) -> ValBatches:
    """Batches for evaluation: `source` once in its order, or the first `max_tokens` over all processes.

    `cut` is what `conversation_stream` calls max_tokens. Keep the result: iterating it again is free.
    """
    tokenizer = load_tokenizer(tokenizer)

    def make(index: int) -> ConversationStream:
        return ConversationStream(
            source,
            tokenizer,
            batch_size,
            seq_len,
            packing=packing,
            mask=mask,
            shuffle=False,
            max_tokens=cut,
            process_index=index,
            process_count=process_count,
            repeat=False,
        )

    make(process_index).close()  # a wrong argument is reported here, not at the first evaluation
    limit = max(1, max_tokens // (batch_size * seq_len * process_count))
    return ValBatches(make, limit, process_index, process_count)


def estimate_tokens(stream: ConversationStream) -> int:
    """The tokens of one epoch's batches over all processes, padding included.

    From conversations spread evenly over the source (all of them if there are few), hence the same number on
    each process and each time.
    """
    n, render, width = len(stream.source), stream.render, stream.seq_len
    chosen = np.unique(np.linspace(0, n - 1, min(n, _SAMPLE)).astype(int)).tolist()
    lengths = []
    for index in chosen:
        ids, mask = render.ids_and_mask(index)
        if any(mask) or not render.mask:
            lengths.append(len(ids))
    if stream.packing == "stream":
        tokens = sum(lengths)
    elif stream.packing == "rows":
        tokens = len(lengths) * width
    else:
        tokens = count_padded_rows(lengths, width + 1, stream.buffer_size) * width
    return round(tokens * n / len(chosen))
