"""The page and its conversations."""

import asyncio
import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from megacontext_jax.infer.server import limits, work
from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.state import Server
from megacontext_jax.infer.server.streams import EventStream, collect

LONGEST = 100_000  # characters of a message; longer texts are files
UPLOADS = 4  # at the same time; further ones wait


def router(server: Server) -> APIRouter:
    routes = APIRouter()
    page = Path(__file__).with_name("page.html").read_bytes()
    headers = page_headers(page.decode())
    uploads = asyncio.Semaphore(UPLOADS)
    call, submit, book = server.scheduler.call, server.scheduler.submit, server.book

    @routes.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    @routes.get("/settings")
    async def settings() -> dict:
        ask = server.defaults
        return {
            "model": server.model_id,
            "kind": server.chat.kind,
            "temperature": ask.temperature,
            "top_k": ask.top_k,
            "max_tokens": ask.max_tokens,
            "upload_mb": server.web.upload_mb,
            "message_characters": LONGEST,
            "on_disk": bool(server.web.sessions),
        }

    @routes.post("/sessions", status_code=201)
    async def create(request: Request) -> dict:
        fields = await limits.read_json(request) if await _has_body(request) else {}
        name = fields.get("name")
        if name is not None and not isinstance(name, str):
            raise Refused(400, "name must be a string.")
        return await call(lambda: work.summary(book.create(name)))

    @routes.get("/sessions/{name}")
    async def show(name: str) -> dict:
        return await call(lambda: work.summary(book.get(name)))

    @routes.get("/sessions/{name}/strip")
    async def strip(name: str) -> dict:
        return await call(lambda: work.strip(book.get(name)))

    @routes.get("/sessions/{name}/messages")
    async def messages(name: str, request: Request) -> dict:
        return (await collect(submit(lambda: work.transcript(book, name)), request))[-1]

    @routes.post("/sessions/{name}/reset")
    async def reset(name: str) -> dict:
        return await call(lambda: work.summary(book.reset(name)))

    @routes.post("/sessions/{name}/say")
    async def say(name: str, request: Request) -> EventStream:
        fields = await limits.read_json(request)
        text = limits.text(fields, "message", LONGEST)
        ask = limits.sampling(fields, server.defaults)
        return EventStream(submit(lambda: work.say(book, name, text, ask)), server.patience)

    @routes.post("/sessions/{name}/documents")
    async def documents(name: str, request: Request, title: str = "text") -> EventStream:
        limits.utf8(title, "title")
        if len(title) > 200:
            raise Refused(400, f"title has {len(title):,} characters and may have 200; shorten it.")
        await call(book.get, name)  # before a long upload
        await uploads.acquire()  # so many texts are in memory, no more
        try:
            remedy = "split the text, or start the server with a larger --upload-mb"
            body = await limits.read_body(request, server.web.upload_mb << 20, remedy)
            try:
                text = await asyncio.to_thread(body.decode, "utf-8-sig")
            except UnicodeDecodeError as error:
                raise Refused(
                    400, f"The text is not UTF-8 (byte {error.start:,}); convert it first."
                ) from None
            if not text.strip():
                raise Refused(400, "The text is empty; send one with words in it.")
            job = submit(lambda: work.ingest(book, name, title, text))
        except BaseException:
            uploads.release()
            raise
        return EventStream(job, server.patience, ended=uploads.release)

    return routes


async def _has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


def page_headers(page: str) -> dict[str, str]:
    """Nothing from elsewhere runs in the page, and it runs in no other page."""
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = (
        "default-src 'none'",
        f"script-src 'sha256-{digest}'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return {
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
