"""The conversations of the page, by name: made, found, put away when there are too many. For the device's thread alone."""

import json
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacontext_jax.context.store import TreeStore
from megacontext_jax.errors import UserError
from megacontext_jax.files import remove_stale_scratch, scratch_path, write_bytes
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.scheduler import log
from megacontext_jax.infer.session import ABOUT, Session

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
DOCUMENTS = "documents.json"
REMEMBERED = 10_000  # names of conversations that are gone, to say so


@dataclass(frozen=True)
class Document:
    """A text that was taken in as a whole: tokens [start, stop) of the history."""

    name: str
    start: int
    stop: int


@dataclass
class Talk:
    """A conversation that is open."""

    name: str
    session: Session
    documents: list[Document] = field(default_factory=list)
    busy: bool = False  # a job changes it
    lookers: int = 0  # jobs that only look

    @property
    def is_idle(self) -> bool:
        return not self.busy and not self.lookers

    def add_document(self, document: Document) -> None:
        self.documents.append(document)
        if self.session.folder:
            rows = [[d.name, d.start, d.stop] for d in self.documents]
            write_bytes(self.session.folder / DOCUMENTS, json.dumps(rows).encode())

    def read_documents(self) -> None:
        """What the folder says of documents; without it they are shown as part of the message they stand in."""
        try:
            rows = json.loads((self.session.folder / DOCUMENTS).read_bytes())
            self.documents = [Document(str(name), int(start), int(stop)) for name, start, stop in rows]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError):
            log.warning(
                "%s cannot be read; documents are shown as messages.", self.session.folder / DOCUMENTS
            )


def checked_name(name: str) -> str:
    """The name, or Refused."""
    if not NAME.fullmatch(name):
        raise Refused(
            400,
            "A conversation's name has 1 to 64 characters of a-z, 0-9, - and _, and begins with a letter or digit; "
            "choose such a name.",
        )
    return name


class Book:
    """At most `max_sessions` open conversations; those in RAM take at most `history_bytes`."""

    def __init__(self, chat: ChatModel, folder: Path | None, max_sessions: int, history_bytes: int):
        self.chat = chat
        self._folder = folder
        self._max = max_sessions
        self._bytes = history_bytes
        self._open: OrderedDict[str, Talk] = OrderedDict()  # least recently used first
        self._gone: OrderedDict[str, None] = OrderedDict()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"Cannot make the folder {folder} ({error.strerror}); choose another with --sessions."
                ) from None
            remove_stale_scratch(folder)

    def __len__(self) -> int:
        return len(self._open)

    def create(self, name: str | None = None) -> Talk:
        """A new, empty conversation. Refused if the name is taken or all open ones are in use."""
        name = checked_name(name) if name else secrets.token_hex(8)
        if name in self._open or (self._folder and (self._folder / name).exists()):
            raise Refused(409, f"There is a conversation named {name} already; choose another name.")
        self._make_room()
        session = self.chat.new_session(self._folder and self._folder / name)
        self._gone.pop(name, None)
        self._open[name] = Talk(name, session)
        return self._open[name]

    def get(self, name: str) -> Talk:
        """The conversation of that name, opened if it lies in the folder. Refused if there is none."""
        checked_name(name)
        if name not in self._open:
            self._reopen(name)
        self._open.move_to_end(name)
        return self._open[name]

    @contextmanager
    def use(self, name: str) -> Iterator[Talk]:
        """The conversation for one job alone; Refused while another has it."""
        talk = self.get(name)
        if talk.busy:
            raise Refused(
                409, f"The conversation {name} is busy with something else; wait for it or stop it."
            )
        talk.busy = True
        try:
            yield talk
        finally:
            talk.busy = False

    @contextmanager
    def look(self, name: str) -> Iterator[Talk]:
        """The conversation, held open; others may change it meanwhile."""
        talk = self.get(name)
        talk.lookers += 1
        try:
            yield talk
        finally:
            talk.lookers -= 1

    def reset(self, name: str) -> Talk:
        """Forgets all that was said; the name stays. Refused while a job has the conversation."""
        if self.get(name).lookers:
            raise Refused(409, f"The conversation {name} is being read; try again in a moment.")
        with self.use(name) as talk:
            talk.session.tree.close()  # nothing of it is wanted
            del self._open[name]
            if self._folder:
                scratch = scratch_path(self._folder / name)
                (self._folder / name).replace(scratch)
                shutil.rmtree(scratch)
        return self.create(name)

    def reserve(self, talk: Talk, tokens: int) -> None:
        """Sees that so many more tokens fit into memory, closing others where needed. Refused if they cannot."""
        if self._folder:
            return
        more = tokens * _bytes_per_token(talk.session.tree)
        if more + _size(talk.session.tree) > self._bytes:
            raise Refused(
                413,
                f"With {tokens:,} tokens more this conversation takes {(more + _size(talk.session.tree)) / 1e6:,.0f} MB of "
                f"memory, and there are {self._bytes / 1e6:,.0f} MB; start the server with --sessions FOLDER or a larger "
                "--history-mb.",
            )
        while more + sum(_size(other.session.tree) for other in self._open.values()) > self._bytes:
            self._close_one(but=talk)

    def close(self) -> None:
        """Saves and closes all conversations."""
        for talk in self._open.values():
            try:
                if self._folder:
                    talk.session.save()
                talk.session.close()
            except (UserError, OSError) as error:
                log.error("The conversation %s could not be saved: %s", talk.name, error)
        self._open.clear()

    def _reopen(self, name: str) -> None:
        folder = self._folder and self._folder / name
        if not folder or not (folder / ABOUT).exists():
            if name in self._gone:
                raise Refused(
                    410, f"The conversation {name} was closed to make room and is gone; begin a new one."
                )
            raise Refused(404, f"There is no conversation named {name}; begin a new one.")
        self._make_room()
        try:
            session = self.chat.open_session(folder, say=log.warning)
        except UserError as error:
            raise Refused(409, str(error)) from None
        self._open[name] = Talk(name, session)
        self._open[name].read_documents()

    def _make_room(self) -> None:
        while len(self._open) >= self._max:
            self._close_one()

    def _close_one(self, but: Talk | None = None) -> None:
        """Closes the conversation that was unused longest."""
        found = next((t for t in self._open.values() if t.is_idle and t is not but), None)
        if found is None:
            raise Refused(503, f"All {len(self._open)} conversations are in use; try again in a moment.")
        del self._open[found.name]
        found.session.close()
        if not self._folder:
            self._gone[found.name] = None
            if len(self._gone) > REMEMBERED:
                self._gone.popitem(last=False)


def _row_bytes(tree: TreeStore, level: int) -> int:
    dtype, shape = tree.spec.row(level)
    return dtype.itemsize * int(np.prod(shape))


def _bytes_per_token(tree: TreeStore) -> float:
    return sum(_row_bytes(tree, level) / tree.spec.block**level for level in range(tree.spec.max_levels + 1))


def _size(tree: TreeStore) -> int:
    """Bytes of a tree in RAM, those gists included that are yet to be made."""
    return round(len(tree) * _bytes_per_token(tree))
