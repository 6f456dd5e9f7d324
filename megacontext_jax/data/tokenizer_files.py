"""A tokenizer's files: our readable `tokenizer.json` and nanochat's `tokenizer.pkl`.

A `Vocabulary` is the whole content of either. Reading the pickle runs nothing (`safe_pickle`): the one class it
may name is replaced by its state dictionary.
"""

import base64
import binascii
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from megacontext_jax import safe_pickle
from megacontext_jax.errors import UserError

JSON_NAME = "tokenizer.json"
PICKLE_NAME = "tokenizer.pkl"
BYTES_NAME = "token_bytes.npy"

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
_ENCODING = "tiktoken.core.Encoding"
_FORMAT = "megacontext-tokenizer"
_VERSION = 1
_MAX_PATTERN = 500  # characters; ten of them can cost the regex engine megabytes
_MAX_SPECIAL = 1_000
_MAX_SPECIAL_NAME = 100  # characters


@dataclass(frozen=True)
class Vocabulary:
    """Split pattern, byte strings in rank order (id = position) and special tokens (name, id) after them."""

    pattern: str
    merges: tuple[bytes, ...]
    special_tokens: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        """Why this is not a vocabulary we can use, or None; tiktoken itself would panic on most of these."""
        count = len(self.merges)
        if len(set(self.merges)) != count:
            return "a token occurs twice"
        if not {bytes([i]) for i in range(256)} <= set(self.merges):
            return "not all 256 single bytes are tokens"
        if len(self.pattern) > _MAX_PATTERN:
            return f"its split pattern has {len(self.pattern):,} characters"
        names = [name for name, _ in self.special_tokens]
        if len(names) > _MAX_SPECIAL or not all(0 < len(name) <= _MAX_SPECIAL_NAME for name in names):
            return "its special tokens are too many or too long"
        missing = [name for name in SPECIAL_TOKENS if name not in names]
        if missing:
            return f"the special token {missing[0]} is missing"
        if len(set(names)) != len(names):
            return "a special token occurs twice"
        if sorted(id_ for _, id_ in self.special_tokens) != list(range(count, count + len(names))):
            return "the ids of the special tokens do not follow the merges"
        return None

    @property
    def size(self) -> int:
        return len(self.merges) + len(self.special_tokens)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over pattern, merges and special tokens; the same for both file formats."""
        hasher = hashlib.sha256()
        specials = sorted(self.special_tokens, key=lambda item: item[1])
        for part in (
            self.pattern.encode(),
            *self.merges,
            *(f"{name}={id_}".encode() for name, id_ in specials),
        ):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
        return hasher.hexdigest()

    def encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "rustbpe",  # the name in every nanochat file
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.merges)},
            special_tokens=dict(self.special_tokens),
        )


def to_json(vocabulary: Vocabulary) -> bytes:
    """`tokenizer.json`: one merge per line, base64, in rank order."""
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "digest": vocabulary.digest,
        "vocab_size": vocabulary.size,
        "pattern": vocabulary.pattern,
        "special_tokens": dict(vocabulary.special_tokens),
        "merges": [base64.b64encode(token).decode() for token in vocabulary.merges],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def to_pickle(vocabulary: Vocabulary) -> bytes:
    """`tokenizer.pkl` as PyTorch nanochat writes and loads it (it unpickles a `tiktoken.Encoding`)."""
    return pickle.dumps(vocabulary.encoding(), protocol=4)


def from_json(path: Path) -> Vocabulary:
    """Reads `tokenizer.json`. Raises UserError when it is damaged or not ours."""
    try:
        content = json.loads(_read(path))
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"its format is {content['format']} {content['version']}")
        vocabulary = Vocabulary(
            content["pattern"],
            tuple(base64.b64decode(token, validate=True) for token in content["merges"]),
            tuple((str(name), int(id_)) for name, id_ in content["special_tokens"].items()),
        )
        if vocabulary.digest != content["digest"]:
            raise ValueError("its digest does not match its content")
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path} is damaged or not a tokenizer of this project ({reason}); restore it, or delete it: the "
            f"tokenizer is then read from a {PICKLE_NAME} beside it, or trained again by scripts.tok_train."
        ) from error
    return vocabulary


def from_pickle(path: Path) -> Vocabulary:
    """Reads nanochat's `tokenizer.pkl` without executing anything in it. Raises UserError when it cannot."""
    try:
        loaded = safe_pickle.loads(
            _read(path, safe_pickle.MAX_BYTES), permitted={_ENCODING: lambda: safe_pickle.Instance(_ENCODING)}
        )
        if not isinstance(loaded, safe_pickle.Instance):
            raise ValueError(f"it holds a {type(loaded).__name__}, not a tiktoken Encoding")
        vocabulary = _from_state(loaded.state)
        vocabulary.encoding()  # refuses a split pattern that does not compile
        return vocabulary
    except UserError:
        raise
    except Exception as error:  # the regex engine's own errors included
        raise UserError(
            f"{path} is damaged or not a nanochat tokenizer ({error}); restore it, or move its folder aside "
            f"and train again with scripts.tok_train."
        ) from error


def read_folder(folder: Path) -> Vocabulary | None:
    """The vocabulary stored in `folder`, None when it holds no tokenizer.

    Raises UserError when a file is damaged, or when the two files hold different tokenizers (PyTorch
    nanochat, sharing the folder, rewrites only the pickle).
    """
    json_path, pickle_path = folder / JSON_NAME, folder / PICKLE_NAME
    if not json_path.exists():
        return from_pickle(pickle_path) if pickle_path.exists() else None
    vocabulary = from_json(json_path)
    if pickle_path.exists():
        other = from_pickle(pickle_path)
        if other.digest != vocabulary.digest:
            raise UserError(
                f"{folder} holds two different tokenizers: {JSON_NAME} ({describe(vocabulary)}) and "
                f"{PICKLE_NAME} ({describe(other)}); delete the one your checkpoints were not trained with."
            )
    return vocabulary


def describe(vocabulary: Vocabulary) -> str:
    return f"vocabulary {vocabulary.size}, digest {vocabulary.digest[:12]}"


def _from_state(state: Any) -> Vocabulary:
    if not isinstance(state, dict):
        raise ValueError("it holds no vocabulary of its own")
    pattern, ranks, specials = (state.get(key) for key in ("pat_str", "mergeable_ranks", "special_tokens"))
    if not (
        isinstance(pattern, str)
        and _is_dict_of(ranks, bytes, int)
        and _is_dict_of(specials, str, int)
        and sorted(ranks.values()) == list(range(len(ranks)))
    ):
        raise ValueError("its vocabulary has an unknown form")
    merges = tuple(sorted(ranks, key=ranks.__getitem__))
    return Vocabulary(pattern, merges, tuple(sorted(specials.items(), key=lambda item: item[1])))


def _is_dict_of(value: Any, key_type: type, value_type: type) -> bool:
    return type(value) is dict and all(
        type(k) is key_type and type(v) is value_type for k, v in value.items()
    )


def _read(path: Path, limit: int = -1) -> bytes:
    """The bytes of a file; of a longer one than `limit`, one byte more than that."""
    try:
        with open(path, "rb") as file:
            return file.read(limit if limit < 0 else limit + 1)
    except OSError as error:
        raise UserError(
            f"Cannot read {path} ({error.strerror}); check the path and its permissions."
        ) from error
