"""A chat server on a port of this machine, in this process, and clients of it."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import httpx
import jax.numpy as jnp
import numpy as np
import uvicorn

from megacontext_jax.config import ChatConfig, WebConfig
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.focus_memory import FocusMemory
from megacontext_jax.infer.model import GPTDecoder
from megacontext_jax.infer.server.app import make_app
from megacontext_jax.infer.server.run import listen, url
from megacontext_jax.infer.server.scheduler import Job
from megacontext_jax.infer.server.state import Server
from tests.infer import mocks
from tests.infer.session_models import TOK, VOCAB, focus_chat

OPTIONS = ChatConfig(temperature=0.0, max_tokens=16)
READABLE = ChatConfig(temperature=1.0, max_tokens=400)


def alphabet(window: int = 1 << 20) -> ChatModel:
    """Says the letter of the place where it stands, without end."""
    decoder = mocks.MockDecoder(
        lambda length_B, _: mocks.one_hot_logits(jnp.asarray(97) + length_B % 26), window=window
    )
    return mocks.mock_chat(decoder)


SPOKEN = np.array([i < 311 and set(TOK.decode_bytes([i])) <= set(b"aeimnorst .") for i in range(VOCAB)])


class Letters(GPTDecoder):
    """Says letters, spaces and dots alone, so that an untrained model never ends its answer."""

    def decode_step(self, params, ids_B, cache):
        logits_BV, cache = super().decode_step(params, ids_B, cache)
        return jnp.where(SPOKEN, logits_BV, -1e9), cache


class LettersMemory(FocusMemory):
    @property
    def logits_1V(self):
        return self._logits_1V

    @logits_1V.setter
    def logits_1V(self, logits_1V):
        self._logits_1V = jnp.where(SPOKEN, logits_1V, -1e9)


class LettersChat(ChatModel):
    def memory(self):
        return LettersMemory(self.focus, {"decode": self.model.params, "train": self.params})


def letters() -> ChatModel:
    """A tiny working context that talks until it is cut."""
    chat = focus_chat(lens="learned")
    decoder = Letters(chat.focus.decoder.cfg, chat.focus.decoder.attention)
    focus = replace(chat.focus, decoder=decoder)
    return LettersChat(chat.tokenizer, chat.name, chat.model._replace(decoder=decoder), focus, chat.params)


@contextmanager
def serving(chat: ChatModel | None = None, options: ChatConfig = OPTIONS, **web):
    """(client, server) of a server that runs."""
    server = Server(chat or alphabet(), replace(WebConfig(port=0), **web), options)
    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that reads nothing is felt soon
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
    with client.stream("POST", f"/sessions/{name}/say", json={"message": message, **options}) as response:
        assert response.status_code == 200, response.read()
        return events(response.iter_lines())


def text_of(found: list[dict]) -> str:
    return "".join(event.get("token", "") for event in found)


def new(client: httpx.Client) -> str:
    return client.post("/sessions").json()["name"]


def refusal(response: httpx.Response, status: int) -> str:
    """The sentence of an error, which must be one."""
    assert response.status_code == status, response.text
    body = response.json()
    sentence = body["error"]["message"] if "error" in body else body["detail"]
    assert sentence.endswith(".")
    assert "Traceback" not in sentence
    return sentence


LONG_ANSWER = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4096}
"""An answer larger than all buffers between the server and a client that reads nothing."""


def slowly(monkeypatch, seconds: float = 0.02) -> None:
    """Makes every step take so long, so that a test can act while an answer is on its way."""
    step = Job.step

    def slow_step(job) -> bool:
        time.sleep(seconds)
        return step(job)

    monkeypatch.setattr(Job, "step", slow_step)


def raw_stream(client: httpx.Client, path: str, body: dict) -> socket.socket:
    """A connection that has sent its request and reads nothing."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect((client.base_url.host, client.base_url.port))
    raw.sendall(head.encode() + data)
    return raw
