"""Text: of tokens as they come, of the answer of a finished row, of a file."""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

from megacontext_jax.errors import UserError

TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


class TextStream:
    """Text of a stream of tokens, never cutting a character in two.

    Bytes that do not complete a character wait for the next token; what still waits at the end becomes
    U+FFFD. Without tools all pieces joined equal the tokens decoded at once; a tool call reads `[12/60 = 0.2]`.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        call, called, output, answered = (tokenizer.special(name) for name in TOOL_TOKENS)
        self._brackets = {call: b"[", called: b"", output: b" = ", answered: b"]"}
        self._called, self._output = called, output
        self._unanswered = False

    def push(self, token: int) -> str:
        """The text this token completes, often its own, sometimes none."""
        data = self._brackets.get(token)
        if data is None:
            data = self._tokenizer.decode_bytes([token])
        if self._unanswered and token != self._output:
            data = b"]" + data
        self._unanswered = token == self._called
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest, at the end of the stream."""
        return self._utf8.decode(b"]" if self._unanswered else b"", final=True)


def answer_text(tokens: Iterable[int], tokenizer) -> str:
    """What a generated answer says to the reader: tool calls and their results left out."""
    return tokenizer.decode(_spoken(tokens, tokenizer))


def _spoken(tokens: Iterable[int], tokenizer) -> Sequence[int]:
    call, called, output, answered = (tokenizer.special(name) for name in TOOL_TOKENS)
    spoken, inside = [], False
    for token in tokens:
        if token in (call, output):
            inside = True
        elif token in (called, answered):
            inside = False
        elif not inside:
            spoken.append(token)
    return spoken


def read_text(path: Path) -> str:
    """A file as text; UserError if it cannot be read or is none."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it first.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}).") from None
