"""Tool use of one row: collects what stands between python_start and python_end, and answers it."""

from megacontext_jax.infer.calculator import calculate


class ToolCalls:
    """nanochat's state machine. A call that has no value gets no answer, and the model goes on by itself."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._start = tokenizer.special("<|python_start|>")
        self._end = tokenizer.special("<|python_end|>")
        self._call: list[int] | None = None

    def push(self, token: int) -> list[int]:
        """Takes the row's next token in; returns the tokens the row must say next (mostly none)."""
        if token == self._start:
            self._call = []
        elif self._call is not None and token == self._end:
            call, self._call = self._call, None
            return self._answer(call)
        elif self._call is not None:
            self._call.append(token)
        return []

    def _answer(self, call: list[int]) -> list[int]:
        result = calculate(self._tokenizer.decode(call)) if call else None
        if result is None:
            return []
        opening, closing = (
            self._tokenizer.special("<|output_start|>"),
            self._tokenizer.special("<|output_end|>"),
        )
        return [opening, *self._tokenizer.encode(result), closing]
