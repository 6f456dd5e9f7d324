"""What is let in: bodies up to a size, JSON, values in their range. Everything else is Refused in one sentence."""

import asyncio
import json
import secrets
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from megacontext_jax.infer.server.errors import Refused
from megacontext_jax.infer.server.work import Ask

JSON_BYTES = 1 << 20  # largest body that is not an upload
DRAINED = 64 << 20  # bytes of a body too large that are still taken in, so that its sender hears why
IDLE_SECONDS = 30  # a sender may pause for so long
MAX_MESSAGES, MAX_CHARACTERS, MAX_TOTAL = 500, 8000, 32_000
MAX_TEMPERATURE, MAX_TOP_K, MAX_TOKENS = 2, 200, 4096


async def read_body(request: Request, limit: int, remedy: str = "send less at a time") -> bytearray:
    """The body. Refused if it is larger than `limit` bytes or its sender stops."""
    length = request.headers.get("content-length", "")
    too_large = length.isdigit() and int(length) > limit
    body, taken = bytearray(), 0
    stream = request.stream()
    try:
        while (part := await asyncio.wait_for(anext(stream, None), IDLE_SECONDS)) is not None:
            taken += len(part)
            too_large = too_large or taken > limit
            if not too_large:
                body += part
            elif taken > DRAINED:
                break
            else:
                body.clear()
    except TimeoutError:
        raise Refused(
            408, f"Nothing more of the body came for {IDLE_SECONDS} seconds; send it again."
        ) from None
    except ClientDisconnect:
        raise Refused(499, "The client has gone.") from None
    if too_large:
        raise Refused(413, f"The body is larger than {limit / (1 << 20):g} MB; {remedy}.")
    return body


async def read_json(request: Request, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The body as a JSON object. Refused for anything else."""
    body = await read_body(request, limit)
    try:
        fields = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refused(400, f"The body is not UTF-8 (byte {error.start:,}); convert it first.") from None
    except RecursionError:
        raise Refused(400, "The body nests too deep; send a flat JSON object.") from None
    except ValueError as error:
        raise Refused(400, f"The body is no JSON ({error}); send a JSON object.") from None
    if not isinstance(fields, dict):
        raise Refused(400, f"The body must be a JSON object, not {_kind(fields)}.")
    return fields


def _no_constant(name: str):
    raise ValueError(f"{name} is no number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def number(fields: dict, name: str, low: float, high: float, default: float, *, above: bool = False) -> float:
    """A number of the fields from `low` (with `above`: more than that) to `high`; null or absent is the default."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(400, f"{name} must be a number, not {_kind(value)}.")
    if not (low < value if above else low <= value) or not value <= high:
        shown = f"{value:g}" if abs(value) < 1e15 else "a number beyond all bounds"
        raise Refused(
            400,
            f"{name} is {shown} and must lie {'above' if above else 'between'} {low:g} and "
            f"{'at most at ' if above else ''}{high:g}.",
        )
    return float(value)


def whole(fields: dict, name: str, low: int, high: int, default: int) -> int:
    """A whole number of the fields from `low` to `high`; null or absent is the default."""
    value = number(fields, name, low, high, default)
    if value != int(value):
        raise Refused(400, f"{name} is {value:g} and must be a whole number.")
    return int(default if fields.get(name) is None else fields[name])


def text(fields: dict, name: str, longest: int) -> str:
    """A string of the fields that is not blank, of at most `longest` characters."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise Refused(400, f"{name} must be a string, not {_kind(value)}.")
    if not value.strip():
        raise Refused(400, f"{name} is empty; write something.")
    if len(value) > longest:
        raise Refused(
            400,
            f"{name} has {len(value):,} characters and may have {longest:,}; shorten it, or take a long text in as a file.",
        )
    return utf8(value, name)


def utf8(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            400, f"{name} has half a surrogate pair at character {error.start:,}; send whole characters."
        ) from None
    return value


def sampling(fields: dict, defaults: Ask) -> Ask:
    """How an answer is drawn, from the fields of a request."""
    return Ask(
        temperature=number(fields, "temperature", 0, MAX_TEMPERATURE, defaults.temperature),
        top_k=whole(fields, "top_k", 0, MAX_TOP_K, defaults.top_k),
        top_p=number(fields, "top_p", 0, 1, defaults.top_p, above=True),
        max_tokens=whole(fields, "max_tokens", 1, MAX_TOKENS, defaults.max_tokens),
        seed=whole(fields, "seed", -(2**63), 2**63, secrets.randbits(31)),
    )
