"""From tokens to text: as they come, and as the answer of a finished row."""

import codecs
from collections.abc import Iterable, Sequence


class TextStream:
    """Text of a stream of tokens, never cutting a character in two.

    Bytes that do not complete a character wait for the next token; what was still waiting at the end becomes
    U+FFFD. All pieces joined equal the tokens decoded at once.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def spoken_tokens(tokens: Iterable[int], tokenizer) -> list[int]:
    """The tokens of an answer that are addressed to the reader: without tool calls and their results."""
    opening = {tokenizer.special("<|python_start|>"), tokenizer.special("<|output_start|>")}
    closing = {tokenizer.special("<|python_end|>"), tokenizer.special("<|output_end|>")}
    spoken, inside = [], False
    for token in tokens:
        if token in opening:
            inside = True
        elif token in closing:
            inside = False
        elif not inside:
            spoken.append(token)
    return spoken


def answer_text(tokens: Sequence[int], tokenizer) -> str:
    """What a generated answer says, tool calls left out."""
    return tokenizer.decode(spoken_tokens(tokens, tokenizer))
