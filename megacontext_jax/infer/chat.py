"""A conversation with a model, and the loop that holds one in a terminal."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TextIO

from megacontext_jax.errors import UserError
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.text import TextStream
from megacontext_jax.telemetry.progress import paint


class ChatOptions(Protocol):
    """How answers are drawn; see `Engine.generate`."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int


class Reply(NamedTuple):
    """The tokens of an answer and why it ended: "end", "length", "window" or "interrupted"."""

    tokens: list[int]
    stop: str


class Conversation:
    """The tokens of a dialogue, as the model reads them. Text of the user is never taken for markup."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = [self._tokenizer.bos]
        self.turns = 0

    def prompt(self, text: str) -> list[int]:
        """The conversation with one more message, up to where the assistant speaks; nothing is kept yet."""
        opening, closing, speak = (
            self._tokenizer.special(name)
            for name in ("<|user_start|>", "<|user_end|>", "<|assistant_start|>")
        )
        return [*self.tokens, opening, *self._tokenizer.encode(text), closing, speak]

    def keep(self, prompt: Sequence[int], reply: Sequence[int]) -> None:
        """Appends an exchange; a reply that was cut is closed."""
        end = self._tokenizer.special("<|assistant_end|>")
        closing = [] if reply and reply[-1] == end else [end]
        self.tokens = [*prompt, *reply, *closing]
        self.turns += 1


class ChatLoop:
    """Asks, streams the answer, remembers both. Works on any text streams, a terminal is not needed.

    Answers go to `out`, remarks (why an answer stopped, how to go on) to `notes`.
    """

    def __init__(
        self,
        engine: Engine,
        options: ChatOptions,
        *,
        seed: int = 42,
        read: Callable[[str], str] = input,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ):
        self._engine = engine
        self._options = options
        self._seed = seed
        self._read = read
        self._out = out or sys.stdout
        self._notes = notes or sys.stderr
        self.conversation = Conversation(engine.tokenizer)

    def answer_once(self, text: str) -> int:
        """Answers one message; the exit status. Raises UserError if it does not fit the window."""
        prompt = self.conversation.prompt(text)
        self._check(prompt)
        return 130 if self._exchange(prompt).stop == "interrupted" else 0

    def run(self) -> int:
        """Talks until quit, exit, or the end of the input; the exit status."""
        while True:
            try:
                text = self._read("\nYou: ").strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return 0
            match text.lower():
                case "":
                    continue
                case "quit" | "exit":
                    return 0
                case "clear":
                    self.conversation.clear()
                    self._note("A new conversation.")
                    continue
            prompt = self.conversation.prompt(text)
            try:
                self._check(prompt)
            except UserError as error:
                self._note(str(error))
                continue
            self._write("\nAssistant: ")
            self._exchange(prompt)

    def _check(self, prompt: Sequence[int]) -> None:
        window = self._engine.window
        if len(prompt) < window:
            return
        if not self.conversation.turns:
            raise UserError(
                f"The message takes {len(prompt):,} tokens, and the model's window holds {window:,} with the "
                "answer; shorten it."
            )
        raise UserError(
            f"With this message the conversation takes {len(prompt):,} tokens, and the model's window holds "
            f"{window:,} with the answer; type clear to start over, or shorten the message."
        )

    def _exchange(self, prompt: list[int]) -> Reply:
        """Answers, says why the answer stopped if not by itself, and remembers."""
        reply = self._stream(prompt)
        self._write("\n")
        self.conversation.keep(prompt, reply.tokens)
        match reply.stop:
            case "length":
                self._note(f"The answer was cut after {len(reply.tokens):,} tokens (--max-tokens).")
            case "window":
                self._note(
                    f"The answer was cut at the end of the model's window of {self._engine.window:,} tokens; "
                    "type clear to start over."
                )
            case "interrupted":
                self._note("Stopped.")
        return reply

    def _stream(self, prompt: list[int]) -> Reply:
        """Writes an answer as it comes. Ctrl-C ends the answer, not the program."""
        text, tokens, stop = TextStream(self._engine.tokenizer), [], None
        try:
            for event in self._engine.generate(
                [prompt],
                max_tokens=self._options.max_tokens,
                temperature=self._options.temperature,
                top_k=self._options.top_k,
                top_p=self._options.top_p,
                seed=self._seed + self.conversation.turns,
            ):
                tokens.append(event.token)
                stop = event.stop
                if stop != "end":
                    self._write(text.push(event.token))
        except KeyboardInterrupt:
            stop = "interrupted"
        self._write(text.flush())
        if stop == "end":
            tokens.pop()  # bos also ends an answer, but must not stand inside a conversation
        return Reply(tokens, stop)

    def _write(self, text: str) -> None:
        """Writes at once; characters the stream's encoding lacks become question marks."""
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()

    def _note(self, text: str) -> None:
        print(paint(text, "dim", self._notes), file=self._notes, flush=True)
