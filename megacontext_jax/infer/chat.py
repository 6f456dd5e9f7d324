"""A conversation in a terminal, over a session."""

import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO

from megacontext_jax.errors import UserError
from megacontext_jax.infer.model import Region
from megacontext_jax.infer.session import Session
from megacontext_jax.infer.text import TextStream
from megacontext_jax.telemetry.progress import Progress, paint

HELP = """/load FILE   put a long text into memory, before the next message
/focus       how the history is shown to the model: span, level, score
/stats       length of the history, entries, what was computed again and why
/save        force everything to the disk (with --session)
/reset       a new conversation (also: clear)
/quit        leave (also: quit, exit)"""


class ChatOptions(Protocol):
    """How answers are drawn; see `Session.answer`."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int


class CtrlC:
    """While it is entered, Ctrl-C is noted for a moment at which nothing is half done; a second one ends the program's work at once."""

    def __init__(self):
        self.pressed = False

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number, frame) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class Reply(NamedTuple):
    """The tokens of an answer and why it ended: "end", "length", "window" or "interrupted"."""

    tokens: list[int]
    stop: str | None


class ChatLoop:
    """Asks, streams the answer, remembers both. Works on any text streams, a terminal is not needed.

    Answers go to `out`, remarks (why an answer stopped, how to go on) to `notes`. The loop closes its session; `start_over` makes
    another, and says where the one before is kept.
    """

    def __init__(
        self,
        session: Session,
        options: ChatOptions,
        *,
        start_over: Callable[[], tuple[Session, Path | None]],
        seed: int = 42,
        read: Callable[[str], str] = input,
        out: TextIO | None = None,
        notes: TextIO | None = None,
    ):
        self.session = session
        self._options = options
        self._start_over = start_over
        self._seed = seed
        self._read = read
        self._out = out or sys.stdout
        self._notes = notes or sys.stderr

    def close(self) -> None:
        self.session.close()

    def answer_once(self, text: str, document: str = "") -> int:
        """Answers one message, after a document if there is one; the exit status. UserError if it does not fit."""
        if document:
            self.session.add_document(document)
        self.session.add_message(text)
        return 130 if self._exchange().stop == "interrupted" else 0

    def run(self) -> int:
        """Talks until quit, exit, or the end of the input; the exit status."""
        while True:
            try:
                text = self._read("\nYou: ").strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return 0
            if text.lower() in ("quit", "exit", "/quit", "/exit"):
                return 0
            if not text:
                continue
            try:
                if text.startswith("/") or text.lower() == "clear":
                    self._command(*text.split(maxsplit=1))
                    continue
                self.session.add_message(text)
            except UserError as error:
                self._note(str(error))
                continue
            self._write("\nAssistant: ")
            self._exchange()

    # --- commands ---

    def _command(self, name: str, rest: str = "") -> None:
        match name.lower():
            case "/reset" | "/clear" | "clear":
                self.session.close()
                self.session, kept = self._start_over()
                self._note("A new conversation." + (f" The one before is in {kept}." if kept else ""))
            case "/load":
                self._load(rest)
            case "/focus":
                self._note("\n".join(focus_lines(self.session)))
            case "/stats":
                self._note("\n".join(f"{name}: {value}" for name, value in stats(self.session).items()))
            case "/save":
                self.session.save()
                self._note(f"Saved in {self.session.folder}.")
            case "/help":
                self._note(HELP)
            case _:
                raise UserError(f"There is no command {name}; these there are:\n{HELP}")

    def _load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs the name of a file.")
        count = self.session.add_file(Path(name).expanduser())
        self._read_history()
        self._note(f"Read {name}: {count:,} tokens. Ask about it.")

    def _read_history(self) -> bool:
        """Lets the model read; False if Ctrl-C stopped it (the rest is read before the next answer)."""
        done, total = self.session.memory.tokens, len(self.session)
        if total - done < 2048:  # not worth a bar
            return True

        def tick(tokens: int) -> None:
            progress.update(tokens - self._told)
            self._told = tokens
            if ctrl_c.pressed:
                raise KeyboardInterrupt

        self._told = done
        try:
            with (
                Progress("reading", total, initial=done, unit="tokens", stream=self._notes) as progress,
                CtrlC() as ctrl_c,
            ):
                self.session.read(tick)
        except KeyboardInterrupt:
            self._note("Stopped reading; it goes on before the next answer.")
            return False
        return True

    # --- an exchange ---

    def _exchange(self) -> Reply:
        """Answers, and says why the answer stopped if not by itself."""
        reply = self._stream() if self._read_history() else Reply([], "interrupted")
        self._write("\n")
        match reply.stop:
            case "length":
                self._note(f"The answer was cut after {len(reply.tokens):,} tokens (--max-tokens).")
            case "window":
                self._note(
                    f"The answer was cut at the end of the model's window of {self.session.memory.capacity:,} tokens; "
                    "type clear to start over."
                )
            case "interrupted":
                self._note("Stopped.")
        return reply

    def _stream(self) -> Reply:
        """Writes an answer as it comes. Ctrl-C ends the answer, not the program."""
        text, tokens, stop = TextStream(self.session.tokenizer), [], None
        answer = self.session.answer(
            max_tokens=self._options.max_tokens,
            temperature=self._options.temperature,
            top_k=self._options.top_k,
            top_p=self._options.top_p,
            seed=self._seed,
        )
        try:
            with CtrlC() as ctrl_c, closing(answer):
                for event in answer:
                    tokens.append(event.token)
                    stop = event.stop
                    if stop != "end":
                        self._write(text.push(event.token))
                    if ctrl_c.pressed and not stop:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            stop = "interrupted"
        self._write(text.flush())
        return Reply(tokens, stop)

    def _write(self, text: str) -> None:
        """Writes at once; characters the stream's encoding lacks become question marks."""
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()

    def _note(self, text: str) -> None:
        print(paint(text, "dim", self._notes), file=self._notes, flush=True)


def focus_lines(session: Session) -> list[str]:
    """One line per region of the history, oldest first."""
    lines = [f"{'tokens':>23}  {'shown as':<22} score"]
    for region in session.regions():
        score = "" if region.score is None else f"{region.score:+.2f}"
        lines.append(f"{region.start:>10,} - {region.stop:>10,}  {shown_as(region):<22} {score}".rstrip())
    return lines


def shown_as(region: Region) -> str:
    if region.level == 0:
        return f"{region.entries:,} tokens"
    size = (region.stop - region.start) // region.entries
    return f"{region.entries:,} gists of {size:,}"


def stats(session: Session) -> dict[str, str]:
    """For people: what a conversation holds and what it cost."""
    found = session.memory.statistics()
    why = ", ".join(f"{count:,} ({name})" for name, count in sorted(found["recomputed"].items()))
    lines = {
        "history": f"{len(session):,} tokens, {session.memory.tokens:,} read",
        "shown in": f"{found['entries']:,} entries"
        + (f" ({found['budget']:,} after a refocus)" if "budget" in found else ""),
    }
    if why:
        lines["keys computed"] = f"{why}; kept through edits: {found['kept']:,}"
    edits = {
        name: found[name]
        for name in ("refocuses", "unpaid", "expands", "collapses", "relayouts")
        if name in found
    }
    if edits:
        lines["focus"] = ", ".join(f"{count:,} {name}" for name, count in edits.items())
    return lines
