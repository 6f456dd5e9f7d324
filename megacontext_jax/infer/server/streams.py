"""Server-sent events: the messages of a job as they come, for a client that may be slow or gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from fastapi import Request
from starlette.responses import Response

from megacontext_jax.errors import UserError
from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.scheduler import Job, Message

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Gone(Exception):
    """The client has closed its connection."""


def event(data: Any) -> bytes:
    """One event; strings go as they are, the rest as JSON."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Answers with what a job says. A job that fails before its first message is an ordinary error.

    `encode` makes events of a message, `failed` one of an error on the way; `ended` is called last. A client that takes nothing in for
    `patience` seconds is let go, and a closed connection ends the job.
    """

    def __init__(
        self,
        job: Job,
        patience: float,
        encode: Callable[[Message], Iterable[Any]] = lambda message: [message],
        failed: Callable[[str], Any] = lambda sentence: {"error": sentence},
        ended: Callable[[], None] = lambda: None,
    ):
        self.status_code = 200
        self.background = None
        self._job, self._patience = job, patience
        self._encode, self._failed, self._ended = encode, failed, ended

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.ensure_future(_closed(receive))
        try:
            await self._stream(self._job.messages(), gone, send)
        except (Gone, TimeoutError, OSError):
            pass
        finally:
            gone.cancel()
            self._job.cancel()
            self._ended()

    async def _stream(self, messages: AsyncIterator[Message], gone: asyncio.Future, send) -> None:
        message = await _unless(gone, anext(messages, None))
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            while message is not None:
                body = b"".join(map(event, self._encode(message)))
                if body:
                    await self._send(send, body)
                message = await _unless(gone, anext(messages, None))
        except (UserError, Refused) as error:
            await self._send(send, event(self._failed(str(error))))
        await self._send(send, b"", more=False)

    async def _send(self, send, body: bytes, more: bool = True) -> None:
        part = {"type": "http.response.body", "body": body, "more_body": more}
        await asyncio.wait_for(send(part), self._patience)


async def collect(job: Job, request: Request) -> list[Message]:
    """All that a job says, for an answer in one piece. A closed connection ends the job."""
    gone = asyncio.ensure_future(_closed(request.receive))
    messages, found = job.messages(), []
    try:
        while (message := await _unless(gone, anext(messages, None))) is not None:
            found.append(message)
    except Gone:
        raise Refused(499, "The client has gone.") from None
    finally:
        gone.cancel()
        job.cancel()
    return found


async def _closed(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future, coming):
    """What `coming` gives; Gone if the client goes before."""
    task = asyncio.ensure_future(coming)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise Gone
    return task.result()
