"""nanochat's endpoints: a conversation per request, with its limits and its form of events."""

from fastapi import APIRouter, Request

from megacontext_jax.infer.server import limits, work
from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.state import Server
from megacontext_jax.infer.server.streams import EventStream


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict:
        running, _ = server.scheduler.counts
        ready = server.scheduler.ready
        return {
            "status": "ok" if ready else "not ready",
            "ready": ready,
            "num_gpus": 1,
            "available_workers": int(ready and running < server.web.max_running),
        }

    @routes.get("/stats")
    async def stats() -> dict:
        running, waiting = server.scheduler.counts
        return {
            "total_workers": 1,
            "available_workers": int(running == 0),
            "busy_workers": int(running > 0),
            "workers": [{"gpu_id": 0, "device": server.device}],
            "running": running,
            "waiting": waiting,
            "sessions": len(server.book),
        }

    @routes.post("/chat/completions")
    async def chat_completions(request: Request) -> EventStream:
        fields = await limits.read_json(request)
        ask = limits.sampling(fields, server.defaults)
        ids = server.prompt_ids(conversation(fields))
        job = server.scheduler.submit(lambda: work.complete(server.chat, ids, ask))
        return EventStream(job, server.patience, events)

    return routes


def events(message: dict) -> list[dict]:
    if "token" in message:
        return [{"token": message["token"], "gpu": 0}]
    return [{"done": True}] if "done" in message else []


def conversation(fields: dict) -> list[tuple[str, str]]:
    """[(role, text)] of `messages`, within nanochat's limits."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise Refused(400, "messages must be a list of objects with role and content.")
    if not 1 <= len(messages) <= limits.MAX_MESSAGES:
        raise Refused(400, f"There are {len(messages):,} messages; send 1 to {limits.MAX_MESSAGES}.")
    turns, total = [], 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise Refused(400, f"{where} must be an object with role and content.")
        if message.get("role") not in ("user", "assistant"):
            raise Refused(400, f"{where} must have the role user or assistant.")
        content = limits.text(
            {f"{where}.content": message.get("content")}, f"{where}.content", limits.MAX_CHARACTERS
        )
        total += len(content)
        turns.append((message["role"], content))
    if total > limits.MAX_TOTAL:
        raise Refused(
            400, f"The messages have {total:,} characters together and may have {limits.MAX_TOTAL:,}."
        )
    return turns
