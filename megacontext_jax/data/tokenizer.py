"""nanochat's tokenizer: byte BPE trained by rustbpe, run by tiktoken, with its nine special tokens.

Ids: the 256 bytes and the merges in rank order, then the special tokens. A small text may run out of pairs
before the wanted size is reached, so every id is taken from the encoding, never from a requested size.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megacontext_jax.data import tokenizer_files as files
from megacontext_jax.data.tokenizer_files import SPECIAL_TOKENS, Vocabulary
from megacontext_jax.errors import UserError
from megacontext_jax.files import write_bytes

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's split with numbers in groups of one or two digits."""

# The regex engine backtracks over white space and gives up (a panic) on runs of about a million characters.
# A run of twice this length contains a whole aligned block of it, and such blocks are encoded on their own.
_BLANK_BLOCK = 100_000


class Tokenizer:
    """Encodes text and conversations. Picklable, and safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._encoding = vocabulary.encoding()
        self._special = dict(vocabulary.special_tokens)
        self.digest = vocabulary.digest

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.vocabulary,)

    def __repr__(self) -> str:
        return f"Tokenizer({files.describe(self.vocabulary)})"

    # Making and keeping

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains on `texts`; `vocab_size` counts the special tokens. The result may be smaller.

        Raises UserError if `vocab_size` cannot hold the bytes and special tokens, `texts` has no text, or
        the package rustbpe is missing: only training needs it.
        """
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise UserError(f"--vocab-size {vocab_size} is too small; it must be at least {smallest}.")
        try:
            import rustbpe
        except ImportError as error:
            raise UserError(
                "Training a tokenizer needs the package rustbpe, which this Python does not have; "
                "install it with `pip install rustbpe`, or use a tokenizer that is trained already."
            ) from error
        seen = False

        def pieces() -> Iterator[str]:
            nonlocal seen
            for text in texts:
                seen = seen or bool(text)
                yield from _safe_pieces(text)

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(pieces(), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        if not seen:
            raise UserError("There is no text to train the tokenizer on; check the data folder.")
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        merges = tuple(bytes(token) for token, _ in ranks)
        specials = tuple((name, len(merges) + i) for i, name in enumerate(SPECIAL_TOKENS))
        return cls(Vocabulary(trainer.get_pattern(), merges, specials))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Loads `tokenizer.json` (digest checked), or a lone `tokenizer.pkl` of PyTorch nanochat.

        Raises UserError naming the file when there is none, or it is damaged.
        """
        vocabulary = files.read_folder(Path(folder))
        if vocabulary is None:
            raise UserError(
                f"There is no tokenizer in {folder} (neither {files.JSON_NAME} nor {files.PICKLE_NAME}); "
                f"train one with `python -m scripts.tok_train`."
            )
        return cls(vocabulary)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.pkl` (for PyTorch nanochat), `token_bytes.npy` and `tokenizer.json`.

        What is there already is left as it is, so that saving again completes a save that was cut short.
        Raises UserError if `folder` already holds a different tokenizer: checkpoints depend on it.
        """
        folder = Path(folder)
        present = files.read_folder(folder)
        if present is not None and present.digest != self.digest:
            raise UserError(
                f"{folder} already holds another tokenizer ({files.describe(present)}; the new one: "
                f"{files.describe(self.vocabulary)}); move that folder aside, or choose another one."
            )
        np.save(table := io.BytesIO(), self.token_bytes())
        if not (folder / files.PICKLE_NAME).exists():
            write_bytes(folder / files.PICKLE_NAME, files.to_pickle(self.vocabulary))
        path = folder / files.BYTES_NAME
        if not path.exists() or path.read_bytes() != table.getvalue():
            write_bytes(path, table.getvalue())
        if not (folder / files.JSON_NAME).exists():
            write_bytes(folder / files.JSON_NAME, files.to_json(self.vocabulary))

    # Properties

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def bos(self) -> int:
        return self._special["<|bos|>"]

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._special)

    def special(self, name: str) -> int:
        """The id of a special token, named as in `"<|bos|>"`."""
        return self._special[name]

    def token_bytes(self, *, legacy: bool = False) -> np.ndarray:
        """int32[V]: the bytes each token stands for, 0 for special tokens.

        `legacy=True` gives the lengths nanochat stored until July 2026: those of the token decoded to a
        string, in which a broken UTF-8 sequence counts as the three bytes of U+FFFD.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for id_, token in enumerate(self.vocabulary.merges):
            lengths[id_] = len(token.decode("utf-8", "replace").encode()) if legacy else len(token)
        return lengths

    # Text

    def encode(
        self,
        text: str | Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Token ids of a string, or of each string of a list; special tokens in the text are plain text.

        `prepend` and `append` add one token, an id or the name of a special token, to each result.
        """
        before, after = self._affix(prepend), self._affix(append)
        if isinstance(text, str):
            return before + self._encode_one(text) + after
        if num_threads <= 1 or len(text) <= 1:
            rows = map(self._encode_one, text)
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                rows = pool.map(self._encode_one, text)
        return [before + row + after for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, for streams that must not cut a character in two."""
        return self._encoding.decode_bytes(list(ids))

    def _encode_one(self, text: str) -> list[int]:
        if len(text) < 2 * _BLANK_BLOCK:
            return self._encoding.encode_ordinary(text)
        return [id_ for piece in _safe_pieces(text) for id_ in self._encoding.encode_ordinary(piece)]

    def _affix(self, token: int | str | None) -> list[int]:
        if token is None:
            return []
        return [self.special(token) if isinstance(token, str) else token]

    # Conversations

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of at most `max_tokens` entries; the mask is 1 on what the assistant has to produce.

        Ask for `max_tokens = T + 1` to fill a training row of T inputs. A leading system message becomes
        the beginning of the first user message. Raises UserError if the turns are not user, assistant, ...
        """
        return self._render(_turns(conversation), max_tokens)

    def render_for_completion(
        self, conversation: Mapping[str, Any], max_tokens: int | None = None
    ) -> list[int]:
        """The prompt for the assistant's next words: the conversation without a closing assistant message,
        cut to `max_tokens` if given (nanochat: 2048), then `<|assistant_start|>`."""
        turns = _turns(conversation)
        if len(turns) % 2 == 0:
            turns = turns[:-1]
        ids, _ = self._render(turns, max_tokens)
        return [*ids, self.special("<|assistant_start|>")]

    def _render(self, turns: list[Mapping[str, Any]], max_tokens: int | None) -> tuple[list[int], list[int]]:
        ids: list[int] = [self.bos]
        mask: list[int] = [0]

        def add(tokens: list[int], trained: int) -> None:
            ids.extend(tokens)
            mask.extend([trained] * len(tokens))

        def bracket(name: str, content: str, trained: int) -> None:
            opening, closing = self.special(f"<|{name}_start|>"), self.special(f"<|{name}_end|>")
            add([opening, *self._encode_one(content), closing], trained)

        for i, turn in enumerate(turns):
            if i % 2 == 0:
                bracket("user", turn["content"], 0)
                continue
            add([self.special("<|assistant_start|>")], 0)
            for kind, text in _parts(turn["content"], i):
                if kind == "text":
                    add(self._encode_one(text), 1)
                elif kind == "python":
                    bracket("python", text, 1)
                else:  # what the tool answered: given, not produced
                    bracket("output", text, 0)
            add([self.special("<|assistant_end|>")], 1)
        return ids[:max_tokens], mask[:max_tokens]


def _safe_pieces(text: str) -> Iterator[str]:
    """`text` in order, cut only around all-blank aligned blocks of `_BLANK_BLOCK` characters."""
    start = 0
    for block in range(0, len(text), _BLANK_BLOCK):
        end = block + _BLANK_BLOCK
        if end <= len(text) and text[block:end].isspace():
            if start < block:
                yield text[start:block]
            yield text[block:end]
            start = end
    if start < len(text):
        yield text[start:]


def _turns(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages as user, assistant, user, ... with a system message merged into the first."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("A conversation must be {'messages': [...]} with at least one message.")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f"Message {i} of a conversation must have the keys 'role' and 'content'.")
    turns = list(messages)
    if turns[0]["role"] == "system":
        if len(turns) < 2 or turns[1]["role"] != "user":
            raise UserError("A system message must be followed by a message from 'user'.")
        for i in (0, 1):
            _require_text(turns[i]["content"], i)
        merged = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns[:2] = [{"role": "user", "content": merged}]
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            raise UserError(
                f"Message {i + len(messages) - len(turns)} of a conversation is from {turn['role']!r}, "
                f"expected {expected!r}: user and assistant must alternate, beginning with user."
            )
        if expected == "user":
            _require_text(turn["content"], i)
    return turns


def _parts(content: Any, index: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of an assistant message, which is a string or a list of parts."""
    if isinstance(content, str):
        yield "text", content
        return
    if not isinstance(content, Sequence):
        raise UserError(f"Message {index} of a conversation must hold a string or a list of parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "python", "python_output"):
            raise UserError(
                f"Message {index} of a conversation has a part of type {kind!r}; "
                f"known are 'text', 'python' and 'python_output'."
            )
        _require_text(part.get("text"), index)
        yield kind, part["text"]


def _require_text(content: Any, index: int) -> None:
    if not isinstance(content, str):
        raise UserError(
            f"Message {index} of a conversation must hold a string, not {type(content).__name__}."
        )
