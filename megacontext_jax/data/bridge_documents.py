"""From rows to documents: rows of token ids are joined and decoded, everything is counted.

Ids have documents between `<|bos|>` (or another special token that is no conversation marker). A row without one
at its start goes on with the document of the row before, so that what was cut into chunks is whole again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np

from megacontext_jax.data.bridge_sources import Source, read_rows
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.data.tokenizer_files import SPECIAL_TOKENS
from megacontext_jax.errors import UserError

ROWS = ("auto", "chunks", "documents")
BYTES_PER_TOKEN = 4  # the estimate where the text was never tokens
LANDMARKS = (1024, 4096, 16384, 65536)  # tokens
_PEEK_ROWS, _PEEK_TOKENS = 1000, 4_000_000  # how far "auto" looks for a beginning of a document
_LARGEST_DOCUMENT = 1 << 28  # tokens; about the GiB that a .txt file may have
_DECODED_AT_ONCE = 1 << 20  # tokens, as a list of Python integers
_CHECKED_TOKENS, _CHECKED_SHARE = 1_000_000, 0.01  # at least so many, then so much of the rest


class Document(NamedTuple):
    """One document; `tokens` is None where it was never tokens, `text` None where a row had none."""

    text: str | None
    tokens: int | None = None


@dataclass
class Check:
    """Does the text of the ids become the same ids again? Counts over the documents looked at."""

    total: int = 0  # tokens decoded
    documents: int = 0
    tokens: int = 0
    other_documents: int = 0
    other_tokens: int = 0
    markers: int = 0  # conversation markers that became line breaks
    notes: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        said = list(self.notes)
        if self.markers:
            said.append(
                f"{self.markers:,} conversation markers (<|user_start|> ...) have no text and became line breaks."
            )
        if self.other_documents:
            said.append(
                f"decoded and encoded again, {self.other_tokens / self.tokens:.2%} of the tokens in "
                f"{self.other_documents:,} of {self.documents:,} documents looked at are other ones than in the "
                "source: it was cut into pieces before it was tokenised, or made by another tokenizer. The text is "
                "right if it reads well; the model will see the new tokens."
            )
        return said


def read_documents(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    rows: str,
    check: Check,
    advance: Callable[[float], None],
) -> Iterator[Document]:
    """The documents of all files in order; `tokenizer` is needed where there are ids.

    `rows` says what a row of ids is: one of "documents", one of "chunks", or ("auto") chunks if a document begins
    anywhere in the first thousand rows. A document may go on in the next file of the same folder.
    Raises UserError naming file and row.
    """
    for (_, ids), group in groupby(sources, lambda source: (source.path.parent, source.ids)):
        files = list(group)
        if not ids:
            for source in files:
                yield from (Document(text) for _, text in read_rows(source, advance))
            continue
        pieces = (
            (source, number, _checked_ids(value, source, number, tokenizer))
            for source in files
            for number, value in read_rows(source, advance)
        )
        joined = rows == "chunks"
        if rows == "auto":
            joined, pieces, count = _any_beginning(pieces, tokenizer)
            if not joined and count:
                check.notes.append(
                    f"no document begins (<|bos|>) in the first {count:,} rows of {files[0].path.parent}: each row is "
                    "taken as a document; --rows chunks joins them."
                )
        yield from _join(pieces, tokenizer, joined, check)


def _checked_ids(
    ids: np.ndarray | None, source: Source, number: int, tokenizer: Tokenizer
) -> np.ndarray | None:
    """int32 [n], a copy that does not hold the batch it came from. Raises UserError for a foreign id."""
    if ids is None or not len(ids):
        return None
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"{source.place(number)}, holds the token id {low if low < 0 else high}, and the tokenizer has the ids "
            f"0 to {tokenizer.vocab_size - 1}; give the one that made these files with --tokenizer."
        )
    return ids.astype(np.int32)


def _special_kinds(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(bool[V] is a delimiter of documents, bool[V] is a conversation marker)"""
    delimiter, marker = np.zeros((2, tokenizer.vocab_size), bool)
    for name, id_ in tokenizer.special_tokens.items():
        (marker if name in SPECIAL_TOKENS[1:] else delimiter)[id_] = True
    return delimiter, marker


def _any_beginning(pieces: Iterator, tokenizer: Tokenizer) -> tuple[bool, Iterator, int]:
    """(is there a delimiter in the first rows, all rows again, how many were looked at)"""
    delimiter, _ = _special_kinds(tokenizer)
    seen, tokens = [], 0
    for piece in pieces:
        seen.append(piece)
        if piece[2] is not None:
            tokens += len(piece[2])
            if delimiter[piece[2]].any():
                return True, chain(seen, pieces), len(seen)
        if len(seen) == _PEEK_ROWS or tokens >= _PEEK_TOKENS:
            break
    return False, chain(seen, pieces), len(seen)


def _join(pieces: Iterable, tokenizer: Tokenizer, joined: bool, check: Check) -> Iterator[Document]:
    delimiter, marker = _special_kinds(tokenizer)
    parts: list[np.ndarray] = []  # of the document that is open
    length = 0
    for source, number, ids in pieces:
        if ids is None:
            yield Document(None)
            continue
        start = 0
        for cut in (*np.flatnonzero(delimiter[ids]).tolist(), len(ids)):
            if cut > start:
                parts.append(ids[start:cut])
                length += cut - start
            if parts and (cut < len(ids) or not joined):
                yield _decode(np.concatenate(parts), tokenizer, marker, check)
                parts, length = [], 0
            start = cut + 1
        if length > _LARGEST_DOCUMENT:
            raise UserError(
                f"{source.place(number)}: no document has begun for {length:,} tokens; if each row is a document, say "
                "--rows documents."
            )
    if parts:
        yield _decode(np.concatenate(parts), tokenizer, marker, check)


def _decode(ids: np.ndarray, tokenizer: Tokenizer, marker: np.ndarray, check: Check) -> Document:
    """The document of int32 [n] ids. Bytes first: a character may be spread over several tokens."""
    marks = np.flatnonzero(marker[ids])
    check.markers += len(marks)
    check.total += len(ids)
    if len(marks):
        data = b"\n".join(_bytes(part[bool(i) :], tokenizer) for i, part in enumerate(np.split(ids, marks)))
    else:
        data = _bytes(ids, tokenizer)
    text = data.decode("utf-8", "replace")
    if not len(marks) and check.tokens < max(_CHECKED_TOKENS, _CHECKED_SHARE * check.total):
        differing = _differing(ids, np.array(tokenizer.encode(text), np.int32), tokenizer.token_bytes())
        check.documents += 1
        check.tokens += len(ids)
        check.other_documents += differing > 0
        check.other_tokens += differing
    return Document(text, len(ids))


def _bytes(ids: np.ndarray, tokenizer: Tokenizer) -> bytes:
    starts = range(0, len(ids), _DECODED_AT_ONCE)
    return b"".join(tokenizer.decode_bytes(ids[i : i + _DECODED_AT_ONCE].tolist()) for i in starts)


def _differing(ids: np.ndarray, again: np.ndarray, lengths: np.ndarray) -> int:
    """How many of `ids` are not found in `again` at the same place in the text."""
    if np.array_equal(ids, again):
        return 0

    def spans(tokens: np.ndarray) -> np.ndarray:
        ends = np.cumsum(lengths[tokens], dtype=np.int64)
        return ends * len(lengths) + tokens

    return max(1, int((~np.isin(spans(ids), spans(again))).sum()))


# Counting


@dataclass
class Counts:
    """What was kept and dropped; `lengths` maps the lower end of a power of two of tokens to documents and bytes."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    null: int = 0
    blank: int = 0
    short: int = 0
    longest: int = 0  # characters
    longest_tokens: int = 0
    lengths: Counter = field(default_factory=Counter)
    length_tokens: Counter = field(default_factory=Counter)

    def keep(self, documents: Iterable[Document], min_chars: int) -> Iterator[str]:
        """The texts that are neither null, blank nor shorter than `min_chars`, counted as they pass."""
        for text, tokens in documents:
            if text is None:
                self.null += 1
            elif not text or text.isspace():
                self.blank += 1
            elif len(text) < min_chars:
                self.short += 1
            else:
                if tokens is None:
                    tokens = max(1, _utf8_bytes(text) // BYTES_PER_TOKEN)
                self.documents += 1
                self.characters += len(text)
                self.tokens += tokens
                self.longest = max(self.longest, len(text))
                self.longest_tokens = max(self.longest_tokens, tokens)
                bucket = 1 << (tokens.bit_length() - 1)
                self.lengths[bucket] += 1
                self.length_tokens[bucket] += tokens
                yield text

    def to_json(self) -> dict:
        buckets = {str(n): [self.lengths[n], self.length_tokens[n]] for n in sorted(self.lengths)}
        plain = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {**plain, "lengths": buckets}


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def describe_counts(counts: dict, exact: bool) -> list[str]:
    """The lines that tell of a data set's size and the lengths of its documents; `counts` as of `to_json`."""
    about = "" if exact else "about "
    lengths = {int(low): pair for low, pair in counts["lengths"].items()}
    lines = [
        f"{counts['documents']:,} documents, {counts['characters']:,} characters, {about}{counts['tokens']:,} tokens; "
        f"the longest has {counts['longest']:,} characters, {about}{counts['longest_tokens']:,} tokens",
        f"dropped: {counts['null']:,} null, {counts['blank']:,} empty, {counts['short']:,} too short",
        f"{'tokens' if exact else 'tokens (bytes / 4)':>20} {'documents':>14} {'share of text':>14}",
    ]
    smallest = max(min(lengths), 32)
    largest = max(max(lengths), smallest)
    for low in (1 << i for i in range(smallest.bit_length() - 1, largest.bit_length())):
        pairs = [pair for n, pair in lengths.items() if n == low or n < low == smallest]
        docs, tokens = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
        span = f"under {2 * low:,}" if low == smallest else f"{low:,} to {2 * low - 1:,}"
        lines.append(f"{span:>20} {docs:>14,} {tokens / counts['tokens']:>14.1%}")
    for mark in LANDMARKS:
        pairs = [pair for low, pair in lengths.items() if low >= mark]
        docs, tokens = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
        lines.append(
            f"at least {mark // 1024}k tokens: {docs:,} documents ({docs / counts['documents']:.1%}), "
            f"{tokens / counts['tokens']:.1%} of the text"
        )
    return lines
