"""A chat server on a port of this machine, in this process, and clients of it."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import jax.numpy as jnp
import uvicorn

from megacontext_jax.config import ChatConfig, WebConfig
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.server.app import make_app
from megacontext_jax.infer.server.run import listen, url
from megacontext_jax.infer.server.state import Server
from tests.infer import mocks

OPTIONS = ChatConfig(temperature=0.0, max_tokens=16)


def alphabet(window: int = 1 << 20) -> ChatModel:
    """Says the letter of the place where it stands, without end."""
    decoder = mocks.MockDecoder(
        lambda length_B, _: mocks.one_hot_logits(jnp.asarray(97) + length_B % 26), window=window
    )
    return mocks.mock_chat(decoder)


@contextmanager
def serving(chat: ChatModel | None = None, options: ChatConfig = OPTIONS, **web):
    """(client, server) of a server that runs."""
    server = Server(chat or alphabet(), replace(WebConfig(port=0), **web), options)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        make_app(server), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    program = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: program.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=url(listener), timeout=60) as client:
            until(lambda: program.started and server.scheduler.ready)
            yield client, server
    finally:
        server.scheduler.stop()
        program.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition, seconds: float = 60.0) -> None:
    """Waits for a condition, which must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def events(lines) -> list[dict]:
    """The events of a stream."""
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def say(client: httpx.Client, name: str, message: str = "Hello", **options) -> list[dict]:
    """The events of a message's answer."""
    with client.stream(
        "POST", f"/sessions/{name}/say", json={"message": message, **options}
    ) as response:
        assert response.status_code == 200, response.read()
        return events(response.iter_lines())


def text_of(found: list[dict]) -> str:
    return "".join(event.get("token", "") for event in found)


def new(client: httpx.Client) -> str:
    return client.post("/sessions").json()["name"]


def raw_stream(client: httpx.Client, path: str, body: dict) -> socket.socket:
    """A connection that has sent its request and reads nothing."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect((client.base_url.host, client.base_url.port))
    raw.sendall(head.encode() + data)
    return raw
