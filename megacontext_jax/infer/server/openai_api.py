"""The chat completions of OpenAI's API, as far as they mean something here; the rest is refused by name."""

import secrets
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request

from megacontext_jax.infer.server import limits, work
from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.state import Server
from megacontext_jax.infer.server.streams import EventStream, collect

LONGEST = 500_000  # characters of all messages together
UNSUPPORTED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio", "prediction")
ROLES = ("system", "developer", "user", "assistant")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error"}


def error_body(error: Refused) -> dict:
    """An error in OpenAI's form."""
    kind = "server_error" if error.status >= 500 else TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def router(server: Server) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    def card() -> dict:
        return {
            "id": server.model_id,
            "object": "model",
            "created": server.started,
            "owned_by": "megacontext-jax",
        }

    @routes.get("/models")
    async def models() -> dict:
        return {"object": "list", "data": [card()]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict:
        _check_model(server, name)
        return card()

    @routes.post("/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> EventStream | dict:
        fields = await limits.read_json(request)
        _check_model(server, fields.get("model", server.model_id))
        _check_supported(fields)
        stream, usage = _switch(fields, "stream"), _wants_usage(fields)
        ids = server.prompt_ids(conversation(fields))
        cut = StopText(stop_texts(fields))
        ask = _ask(fields, server)

        def make():
            return cut.steps(work.complete(server.chat, ids, ask))

        form = Form(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), server.model_id, usage)
        job = server.scheduler.submit(make)
        if stream:
            return EventStream(
                job, server.patience, form.chunks, lambda words: error_body(Refused(500, words))
            )
        return form.whole(await collect(job, request))

    return routes


class Form:
    """The objects of one completion."""

    def __init__(self, name: str, created: int, model: str, usage: bool):
        self._name, self._created, self._model, self._usage = name, created, model, usage

    def chunks(self, message: dict) -> Iterable[Any]:
        if "start" in message:
            yield self._chunk({"role": "assistant", "content": ""})
        elif "token" in message:
            yield self._chunk({"content": message["token"]})
        elif "done" in message:
            yield self._chunk({}, reason(message))
            if self._usage:
                yield self._head("chat.completion.chunk") | {"choices": [], "usage": usage_of(message)}
            yield "[DONE]"

    def whole(self, messages: list[dict]) -> dict:
        text, done = "".join(m.get("token", "") for m in messages), messages[-1]
        answer = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": reason(done)}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage_of(done)}

    def _chunk(self, delta: dict, finish: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict:
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model}


def reason(done: dict) -> str:
    return "stop" if done["stop"] in ("end", "stop") else "length"


def usage_of(done: dict) -> dict:
    read, said = done["prompt_tokens"], done["tokens"]
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


class StopText:
    """Ends an answer before the first of some texts; holds back what may be the beginning of one."""

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""

    def steps(self, steps: work.Steps) -> work.Steps:
        said = prompt = 0
        for messages in steps:
            out = []
            for message in messages:
                prompt = message.get("prompt_tokens", prompt)
                if "token" in message:
                    said += 1
                    text, stopped = self.push(message["token"])
                    out += [{"token": text}] if text else []
                    if stopped:
                        steps.close()
                        done = {"done": True, "stop": "stop", "tokens": said, "prompt_tokens": prompt}
                        yield [*out, done]
                        return
                else:
                    if "done" in message and self._held:
                        out.append({"token": self._held})
                    out.append(message)
            yield out

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop has come)."""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            return text[: min(places)], True
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def conversation(fields: dict) -> list[tuple[str, str]]:
    """[(role, text)] of `messages`; what the system says becomes the beginning of the next user's message."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one object with role and content.")
    if len(messages) > limits.MAX_MESSAGES:
        raise Refused(400, f"There are {len(messages):,} messages; send 1 to {limits.MAX_MESSAGES}.")
    turns, system, total = [], [], 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(
                400, f"messages[{i}] must be an object with content and a role of {', '.join(ROLES)}."
            )
        text = _content(message.get("content"), f"messages[{i}].content")
        total += len(text)
        if message["role"] in ("system", "developer"):
            system.append(text)
        elif message["role"] == "user":
            turns.append(("user", "\n\n".join([*system, text])))
            system = []
        else:
            turns.append(("assistant", text))
    if total > LONGEST:
        raise Refused(400, f"The messages have {total:,} characters together and may have {LONGEST:,}.")
    if not turns or system:
        raise Refused(400, "What the system says must be followed by a message of the user; add one.")
    return turns


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise Refused(400, f"{where} may have parts of the type text alone.")
        content = "".join(part["text"] for part in content)
    return limits.text({where: content}, where, LONGEST)


def stop_texts(fields: dict) -> list[str]:
    stops = fields.get("stop")
    stops = [stops] if isinstance(stops, str) else stops or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise Refused(400, "stop must be a string or a list of at most 4 strings that are not empty.")
    return stops


def _ask(fields: dict, server: Server) -> work.Ask:
    fields = dict(fields)
    if fields.get("max_completion_tokens") is not None:
        fields["max_tokens"] = limits.whole(fields, "max_completion_tokens", 1, limits.MAX_TOKENS, 1)
    # a nucleus is asked for instead of the server's own top-k
    given = fields.get("top_p") is not None and fields.get("top_k") is None
    return limits.sampling(fields, replace(server.defaults, top_k=0) if given else server.defaults)


def _check_model(server: Server, name: Any) -> None:
    if name != server.model_id:
        shown = repr(name) if isinstance(name, str) and len(name) < 100 else "of that name"
        raise Refused(
            404, f"There is no model {shown}; this server has {server.model_id!r}.", code="model_not_found"
        )


def _check_supported(fields: dict) -> None:
    for name in UNSUPPORTED:
        if fields.get(name):
            raise Refused(400, f"{name} is not supported here; leave it out.")
    for name in ("frequency_penalty", "presence_penalty"):
        if limits.number(fields, name, -2, 2, 0):
            raise Refused(400, f"{name} is not supported here; leave it out.")
    limits.whole(fields, "n", 1, 1, 1)
    form = fields.get("response_format")
    if form is not None and form != {"type": "text"}:
        raise Refused(400, 'response_format is not supported here but as {"type": "text"}; leave it out.')


def _switch(fields: dict, name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} must be true or false.")
    return bool(value)


def _wants_usage(fields: dict) -> bool:
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object.")
    return _switch(options or {}, "include_usage")
