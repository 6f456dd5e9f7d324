"""The web server over time: many clients at once, clients that are slow or gone, memory, restarts."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jax
import psutil
import pytest

from megacontext_jax.config import ChatConfig, WebConfig
from megacontext_jax.errors import UserError
from megacontext_jax.infer.server import work
from megacontext_jax.infer.server.run import listen, serve
from megacontext_jax.infer.server.state import Server
from tests.infer import web
from tests.infer.session_models import focus_chat
from tests.infer.web import refusal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def served():
    with web.serving() as found:
        yield found


@pytest.fixture
def client(served):
    return served[0]


# --- many clients ---


def spread(client, count: int, tokens: int) -> list[float]:
    """Seconds until each of `count` answers, begun together, was over; of those that did not end by themselves."""
    names = [web.new(client) for _ in range(count)]
    barrier, seconds, failures = threading.Barrier(count), [0.0] * count, []

    def talk(i: int) -> None:
        try:
            with httpx.Client(base_url=client.base_url, timeout=300) as own:
                barrier.wait()
                begun = time.monotonic()
                found = web.say(own, names[i], f"Hello {i}", max_tokens=tokens)
                seconds[i] = time.monotonic() - begun
                assert found[-1]["stop"] in ("end", "length")
                if found[-1]["stop"] == "end":
                    seconds[i] = 0.0
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return [second for second in seconds if second]


def test_clients_take_turns(client, monkeypatch):
    web.slowly(monkeypatch, 0.004)
    seconds = spread(client, 8, 400)
    assert len(seconds) == 8
    assert max(seconds) < 1.5 * min(seconds)


def test_a_long_text_does_not_hold_up_an_answer():
    with web.serving(focus_chat(lens="learned"), upload_mb=4) as (client, _):
        reader, talker = web.new(client), web.new(client)
        web.say(client, talker)
        over = threading.Event()

        def read() -> None:
            client.post(f"/sessions/{reader}/documents", content="A town by the sea.\n" * 8_000)
            over.set()

        thread = threading.Thread(target=read)
        thread.start()
        web.until(lambda: client.get(f"/sessions/{reader}").json()["tokens"] > 0)
        begun = time.monotonic()
        found = web.say(client, talker, max_tokens=16)
        assert not over.is_set()
        assert found[-1]["tokens"] > 0
        assert time.monotonic() - begun < 10
        thread.join()
        strip = client.get(f"/sessions/{reader}/strip").json()
        assert strip["entries"] <= strip["budget"] + 64
        assert max(region[0] for region in strip["regions"]) > 2


def test_more_answers_than_may_run_wait_and_too_many_are_sent_away():
    with web.serving(max_running=1, max_waiting=1, slow_seconds=30) as (client, server):
        stuck = web.raw_stream(client, "/chat/completions", web.LONG_ANSWER)
        web.until(lambda: server.scheduler.counts == (1, 0))
        waiting = web.raw_stream(client, "/chat/completions", web.LONG_ANSWER)
        web.until(lambda: server.scheduler.counts == (1, 1))
        response = client.post(f"/sessions/{web.new(client)}/say", json={"message": "x"})
        assert "waiting already" in refusal(response, 503)
        assert response.headers["retry-after"] == "1"
        stuck.close()  # the first ends, the second begins
        web.until(lambda: server.scheduler.counts[1] == 0)
        waiting.close()
        web.until(lambda: server.scheduler.counts == (0, 0))


# --- clients that are slow or gone ---


def test_a_slow_reader_is_waited_for_and_then_dropped(monkeypatch):
    counted, complete = [], work.complete

    def counting(*args):
        for messages in complete(*args):
            counted.append(len(messages))
            yield messages

    monkeypatch.setattr(work, "complete", counting)
    with web.serving(slow_seconds=1) as (client, server):
        slow = web.raw_stream(client, "/chat/completions", web.LONG_ANSWER)
        web.until(lambda: len(counted) > 10)
        web.until(lambda: server.scheduler.counts == (0, 0))
        assert sum(counted) < 4096  # it stood still
        assert web.say(client, web.new(client), max_tokens=3)[-1]["done"]
        slow.close()
    with web.serving(slow_seconds=30) as (client, server):
        counted.clear()
        slow = web.raw_stream(client, "/chat/completions", web.LONG_ANSWER)
        web.until(lambda: len(counted) > 10)
        before = -1
        while before != len(counted):
            before = len(counted)
            time.sleep(0.1)
        assert server.scheduler.counts == (1, 0)
        assert sum(counted) < 4096
        data = b""
        while b'"done"' not in data[-100:]:  # it goes on where it stood
            data += slow.recv(1 << 16)
        assert data.count(b'"token"') == sum(counted) - 2 == 4096
        slow.close()


def test_a_connection_that_drops_ends_its_answer(client, served, monkeypatch):
    name = web.new(client)
    web.slowly(monkeypatch)
    with client.stream("POST", f"/sessions/{name}/say", json={"message": "x", "max_tokens": 4096}) as stream:
        next(line for line in stream.iter_lines() if '"token":' in line)
    web.until(lambda: served[1].scheduler.counts == (0, 0))
    monkeypatch.undo()
    kept = client.get(f"/sessions/{name}").json()["tokens"]
    assert kept < 4096
    found = web.say(client, name, "go on", max_tokens=3)
    assert found[-1]["tokens"] == 3
    messages = client.get(f"/sessions/{name}/messages").json()["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]


def test_an_error_in_the_thread_is_told_and_survived(client, served, monkeypatch, caplog):
    name = web.new(client)
    session = served[1].book.get(name).session
    monkeypatch.setattr(session, "settle", lambda *_: 1 / 0)
    found = web.say(client, name)
    assert "console" in found[-1]["error"]
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert web.say(client, web.new(client))[-1]["done"]


# --- memory and restarts ---


def test_the_least_used_conversations_in_memory_are_gone():
    with web.serving(max_sessions=2) as (client, server):
        first, second = web.new(client), web.new(client)
        client.get(f"/sessions/{first}")
        third = web.new(client)
        assert "closed to make room" in refusal(client.get(f"/sessions/{second}"), 410)
        assert client.get(f"/sessions/{first}").status_code == 200
        assert client.get(f"/sessions/{third}").status_code == 200
        assert len(server.book) == 2


def test_conversations_in_memory_have_a_budget():
    with web.serving(history_mb=1) as (client, _):
        first, second = web.new(client), web.new(client)
        text = "x" * 50 + "\n"
        client.post(f"/sessions/{first}/documents", content=text * 3000)
        found = web.events(client.post(f"/sessions/{second}/documents", content=text * 9000).iter_lines())
        assert "--history-mb" in found[-1]["error"]
        client.post(f"/sessions/{second}/documents", content=text * 3000)
        refusal(client.get(f"/sessions/{first}"), 410)


def test_conversations_on_disk_outlive_the_server(tmp_path):
    chat = focus_chat(lens="learned")
    with web.serving(chat, sessions=str(tmp_path / "talks"), max_sessions=1) as (client, server):
        first = web.new(client)
        client.post(f"/sessions/{first}/documents?title=a.txt", content="A town by the sea.\n" * 40)
        said = web.text_of(web.say(client, first, "Hello"))
        second = web.new(client)
        assert len(server.book) == 1
        assert client.get(f"/sessions/{first}").json()["on_disk"]  # opened again
        before = client.get(f"/sessions/{first}/messages").json()
        web.say(client, second, "x", max_tokens=2)
    with web.serving(chat, sessions=str(tmp_path / "talks")) as (client, _):
        after = client.get(f"/sessions/{first}/messages").json()
        assert after == before
        assert [m["role"] for m in after["messages"]][:2] == ["document", "user"]
        assert not said.strip() or after["messages"][2]["text"] == said
        assert web.say(client, first, "And?", max_tokens=4)[-1]["done"]
        client.post(f"/sessions/{first}/reset")
        assert client.get(f"/sessions/{first}").json()["tokens"] == 0
    assert sorted(path.name for path in (tmp_path / "talks").iterdir()) == sorted([first, second])


def test_the_end_of_the_server_ends_streams_and_saves(tmp_path, monkeypatch):
    web.slowly(monkeypatch)
    with web.serving(sessions=str(tmp_path), slow_seconds=30) as (client, server):
        name = web.new(client)
        with client.stream(
            "POST", f"/sessions/{name}/say", json={"message": "x", "max_tokens": 4096}
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            begun = time.monotonic()
            server.scheduler.stop()
            found = web.events(lines)
            assert "stopping" in found[-1]["error"]
            assert time.monotonic() - begun < 5
        assert "stopping" in refusal(client.post("/sessions"), 503)
    with web.serving(sessions=str(tmp_path)) as (client, _):
        assert client.get(f"/sessions/{name}").json()["tokens"] > 3


def test_a_thread_that_dies_ends_the_program(monkeypatch):
    monkeypatch.setattr(work, "warm_up", lambda *_: 1 / 0)
    server = Server(web.alphabet(), WebConfig(port=0), web.OPTIONS)
    with pytest.raises(ZeroDivisionError):
        serve(server, lambda line: None)


def test_a_device_that_is_too_small_is_told_of(monkeypatch):
    server = Server(focus_chat(), WebConfig(), web.OPTIONS)
    assert server.memory_note() is None  # a CPU does not say

    class Small:
        def memory_stats(self):
            return {"bytes_limit": 1_000_000, "bytes_in_use": 500_000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    assert "128 conversations of" in server.memory_note()


def test_options_that_do_not_fit(tmp_path):
    for options in ({"upload_mb": 0}, {"max_running": 0}, {"slow_seconds": 0}):
        with pytest.raises(UserError, match="must be at least 1"), web.serving(**options):
            pass
    with pytest.raises(UserError, match="temperature"), web.serving(options=ChatConfig(temperature=-1.0)):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--sessions"), web.serving(sessions=str(tmp_path / "file")):
        pass
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--port 70000"):
        listen("127.0.0.1", 70_000)


@pytest.mark.slow
def test_sixty_four_clients_are_served_alike():
    """Prints the figures of docs/testing.md; the models are tiny, the clients real connections."""
    process = psutil.Process()
    for name, chat in (("mock", web.alphabet()), ("working context", web.letters())):
        with web.serving(chat, options=ChatConfig(temperature=1.0)) as (client, server):
            spread(client, 64, 16)
            before = process.memory_info().rss / 1e6
            peaks, over = [], threading.Event()

            def watch(peaks=peaks, over=over) -> None:
                while not over.wait(0.05):
                    peaks.append(process.memory_info().rss / 1e6)

            watcher = threading.Thread(target=watch)
            watcher.start()
            seconds = spread(client, 64, 1024)
            over.set()
            watcher.join()
            after = process.memory_info().rss / 1e6
            print(
                f"\n{name}: {len(seconds)} of 64 answers of 1,024 tokens in {max(seconds):.1f} s, slowest/fastest "
                f"{max(seconds) / min(seconds):.3f}; memory {before:.0f} MB before, {max(peaks):.0f} MB at most, "
                f"{after:.0f} MB after; {len(server.book)} conversations open"
            )
            assert len(seconds) == 64
            assert max(seconds) < 1.5 * min(seconds)
            assert max(peaks) - before < 150


PROGRAM = """
from megacontext_jax.cli import run_main
from megacontext_jax.config import WebConfig
from megacontext_jax.infer.server.run import serve
from megacontext_jax.infer.server.state import Server
from tests.infer import web

def main(argv):
    server = Server(web.alphabet(), WebConfig(port=0, sessions=argv[0]), web.OPTIONS)
    serve(server, lambda line: print(line, flush=True))

run_main(main)
"""


def test_ctrl_c_in_the_middle_of_an_answer(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # a suite that runs in the background ignores Ctrl-C, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    address = re.search(r"http://127.0.0.1:\d+/", program.stdout.readline()).group()
    with httpx.Client(base_url=address, timeout=30) as client:
        name = web.new(client)
        body = {"message": "x", "max_tokens": 4096}
        with client.stream("POST", f"/sessions/{name}/say", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            begun = time.monotonic()
            program.send_signal(signal.SIGINT)
            found = web.events(lines)
            assert "stopping" in found[-1]["error"] or found[-1]["done"]
    _, errors = program.communicate(timeout=20)
    assert time.monotonic() - begun < 5
    assert program.returncode == 130
    assert errors == "interrupted\n"
    with web.alphabet().open_session(tmp_path / name) as session:
        assert len(session) > 3
