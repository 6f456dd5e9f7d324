"""The web server: every endpoint, its limits, many clients at once, clients that are slow or gone, restarts."""

import json
import re
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.config import ChatConfig
from megacontext_jax.errors import UserError
from megacontext_jax.infer.server import work
from megacontext_jax.infer.server.openai_api import StopText
from megacontext_jax.infer.server.run import listen
from tests.infer import web
from tests.infer.session_models import TOK, focus_chat, plain_chat


@pytest.fixture(scope="module")
def served():
    with web.serving(upload_mb=1) as found:
        yield found


@pytest.fixture
def client(served):
    return served[0]


def refusal(response: httpx.Response, status: int) -> str:
    """The sentence of an error, which must be one."""
    assert response.status_code == status, response.text
    body = response.json()
    sentence = body["error"]["message"] if "error" in body else body["detail"]
    assert sentence.endswith(".")
    assert "Traceback" not in sentence
    return sentence


# --- nanochat's endpoints ---


def test_health_and_stats(client):
    assert client.get("/health").json() == {
        "status": "ok",
        "ready": True,
        "num_gpus": 1,
        "available_workers": 1,
    }
    stats = client.get("/stats").json()
    assert stats["total_workers"] == 1
    assert stats["workers"][0]["gpu_id"] == 0


def test_nanochat_completions_stream_tokens(client):
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "d"}] * 2
    body = {"messages": messages[:3], "temperature": 0, "max_tokens": 5, "top_k": 0}
    with client.stream("POST", "/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = web.events(response.iter_lines())
    assert found[-1] == {"done": True}
    assert [set(event) for event in found[:-1]] == [{"token", "gpu"}] * 5
    read = 1 + (3 + 2) + (1 + 2) + (3 + 2) + 1
    assert web.text_of(found) == "".join(chr(97 + (read + i) % 26) for i in range(5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "0 messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 501}, "501 messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "empty"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "8,001 characters"),
        ({"messages": [{"role": "user", "content": "x" * 8000}] * 5}, "40,000 characters"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role user or assistant"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be a string, not a number"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": ["x"]}, r"messages\[0\] must be an object"),
        ({"messages": "x"}, "must be a list"),
        ({"temperature": 2.1}, "temperature is 2.1 and must lie between 0 and 2"),
        ({"temperature": -0.1}, "between 0 and 2"),
        ({"temperature": "hot"}, "temperature must be a number, not a string"),
        ({"temperature": True}, "not true or false"),
        ({"top_k": 201}, "between 0 and 200"),
        ({"top_k": 1.5}, "whole number"),
        ({"max_tokens": 0}, "between 1 and 4096"),
        ({"max_tokens": 4097}, "between 1 and 4096"),
        ({"max_tokens": 10**400}, "beyond all bounds"),
        ({"seed": 1e300}, "beyond all bounds"),
    ],
)
def test_nanochat_limits(client, change, words):
    body = {"messages": [{"role": "user", "content": "x"}]} | change
    sentence = refusal(client.post("/chat/completions", content=json.dumps(body)), 400)
    assert re.search(words, sentence), sentence


HOSTILE = {
    "no json": (b"{", 400, "no JSON"),
    "not utf-8": (b'{"messages": "\xff"}', 400, "not UTF-8"),
    "deep": (b'{"a":' + b"[" * 200_000, 400, "deep"),
    "deep objects": (b'{"a":' * 50_000, 400, "deep"),
    "nan": (b'{"temperature": NaN}', 400, "NaN"),
    "infinity": (b'{"temperature": -Infinity}', 400, "Infinity"),
    "overflow": (b'{"messages":[{"role":"user","content":"x"}],"temperature": 1e999}', 400, "bounds"),
    "long number": (b'{"max_tokens": ' + b"9" * 10_000 + b"}", 400, "no JSON"),
    "a list": (b"[]", 400, "not a list"),
    "nothing": (b"", 400, "no JSON"),
    "ten megabytes": (b'{"messages":"' + b"x" * 10_000_000 + b'"}', 413, "larger than 1 MB"),
}


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/sessions/none/say"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bodies_get_one_sentence(client, path, kind):
    body, status, words = HOSTILE[kind]
    sentence = refusal(client.post(path, content=body), status)
    if (path, kind) not in {("/sessions/none/say", "overflow")}:
        assert words in sentence
    assert client.get("/health").json()["ready"]


def test_a_body_without_a_length_has_the_same_limit(client):
    parts = (b"x" * 100_000 for _ in range(30))
    assert "larger than 1 MB" in refusal(client.post("/chat/completions", content=parts), 413)


def test_unknown_paths_and_methods(client):
    assert "nothing at /none" in refusal(client.get("/none"), 404)
    assert "does not take GET" in refusal(client.get("/chat/completions"), 405)
    assert "error" in client.get("/v1/none").json()


def test_pages_of_other_sites_are_kept_out(client):
    own = str(client.base_url).rstrip("/")
    assert client.post("/sessions", headers={"origin": own}).status_code == 201
    refusal(client.post("/sessions", headers={"origin": "http://evil.example"}), 403)
    refusal(client.post("/sessions", headers={"origin": "null"}), 403)


# --- OpenAI's API ---


def complete(client, **fields):
    body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 6, "temperature": 0} | fields
    return client.post("/v1/chat/completions", json=body)


def test_models(client):
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == "mock"
    assert client.get("/v1/models/mock").json() == card
    refusal(client.get("/v1/models/other"), 404)


def test_openai_completion_in_one_piece(client):
    answer = complete(client, model="mock").json()
    assert answer["object"] == "chat.completion"
    read = 1 + 5 + 1
    assert answer["choices"][0]["message"]["content"] == "".join(chr(97 + read + i) for i in range(6))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 6, "total_tokens": read + 6}


def test_openai_stream(client):
    whole = complete(client).json()["choices"][0]["message"]["content"]
    response = complete(client, stream=True, stream_options={"include_usage": True})
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = web.events(lines)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert said == whole
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 6


def test_openai_stop_texts(client):
    whole = complete(client).json()["choices"][0]["message"]["content"]
    answer = complete(client, stop=[whole[2:4], "zz"]).json()
    assert answer["choices"][0]["message"]["content"] == whole[:2]
    assert answer["choices"][0]["finish_reason"] == "stop"


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_stop_texts_cut_streams_where_they_cut_the_whole(text, stops, size):
    places = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(places)] if places else text
    parts = [{"token": text[i : i + size]} for i in range(0, len(text), size)]
    steps = ([part] for part in [*parts, {"done": True, "stop": "length", "tokens": 0}])
    found = [message for messages in StopText(stops).steps(steps) for message in messages]
    # a stop that ends later may begin earlier: streams end at the first that is complete
    said = web.text_of(found)
    assert said == expected or (len(stops) > 1 and text.startswith(said))
    assert not any(stop in said for stop in stops)


def test_openai_messages_of_the_system_and_in_parts(client):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "abc"}]},
    ]
    plain = complete(client, messages=[{"role": "user", "content": "be kind\n\nabc"}]).json()
    assert complete(client, messages=messages).json()["usage"] == plain["usage"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "gpt"}, 404, "no model 'gpt'"),
        ({"n": 2}, 400, "n is 2"),
        ({"tools": [{}]}, 400, "tools is not supported"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"stream": "yes"}, 400, "stream must be true or false"),
        ({"stop": [1]}, 400, "stop must be"),
        ({"top_p": 0}, 400, "above 0"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "followed by"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "type text alone"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "a role of"),
        ({"max_completion_tokens": -1}, 400, "max_completion_tokens"),
    ],
)
def test_openai_errors(client, fields, status, words):
    response = complete(client, **fields)
    assert words in refusal(response, status)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# --- the page's conversations ---


def test_the_page_is_self_contained(client):
    response = client.get("/")
    page = response.text
    assert "script-src 'sha256-" in response.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "innerHTML" not in page
    assert client.get("/settings").json()["max_tokens"] == 16


def test_a_conversation_of_the_page(client):
    name = web.new(client)
    found = web.say(client, name, "Hello", max_tokens=12)
    done = found[-1]
    assert found[0]["start"]
    assert (done["stop"], done["tokens"]) == ("length", 12)
    assert len(web.text_of(found)) == 12
    assert found[-2]["strip"]["tokens"] == done["history"] == done["prompt_tokens"] + 12
    assert client.get(f"/sessions/{name}").json()["tokens"] == done["history"]
    strip = client.get(f"/sessions/{name}/strip").json()
    assert strip["regions"] == [[0, 0, done["history"], done["history"], None]]
    messages = client.get(f"/sessions/{name}/messages").json()["messages"]
    assert [(m["role"], m["text"]) for m in messages] == [
        ("user", "Hello"),
        ("assistant", web.text_of(found)),
    ]
    assert client.post(f"/sessions/{name}/reset").json()["tokens"] == 0
    assert client.get(f"/sessions/{name}/messages").json()["messages"] == []


def test_a_text_is_taken_in(client):
    name = web.new(client)
    text = "Riga is a town.\n" * 2000
    response = client.post(f"/sessions/{name}/documents", params={"title": "riga.txt"}, content=text)
    found = web.events(response.iter_lines())
    assert found[-1]["done"]
    kept = [event["kept"] for event in found if "kept" in event]
    assert kept == sorted(kept)
    assert kept[-1] == found[-1]["tokens"]
    assert any("reading" in event for event in found)
    web.say(client, name, "Who?")
    document, question, _ = client.get(f"/sessions/{name}/messages").json()["messages"]
    assert (document["role"], document["name"]) == ("document", "riga.txt")
    assert (question["role"], question["text"]) == ("user", "Who?")


def test_a_text_taken_in_by_pieces_is_the_document_as_a_whole(client, served):
    text = "Riga, a town.\n\n  Zürich too.\n" * 8000
    name = web.new(client)
    client.post(f"/sessions/{name}/documents", content=text)
    server = served[1]
    with server.chat.new_session() as session:
        session.add_document(text)
        np.testing.assert_array_equal(server.book.get(name).session.tree.tokens(), session.tree.tokens())


@given(st.text(st.sampled_from(" \n\r\tab1'.,é漢😀\u00a0\u2028"), max_size=60), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_pieces_encode_like_the_whole(text, size):
    found = list(work.pieces(text, size))
    assert "".join(found) == text
    assert [i for piece in found for i in TOK.encode(piece)] == TOK.encode(text)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"\xff\xfe", 400, "not UTF-8 (byte 0)"),
        (b" \n", 400, "empty"),
        (b"x" * (2 << 20), 413, "larger than 1 MB"),
    ],
)
def test_texts_that_are_refused(client, body, status, words):
    name = web.new(client)
    assert words in refusal(client.post(f"/sessions/{name}/documents", content=body), status)
    assert client.get(f"/sessions/{name}").json()["tokens"] == 0


@pytest.mark.parametrize("name", ["%2e%2e", "A", "a b", "-a", "a" * 65, "..%2f..%2fetc", "con%00"])
def test_names_without_tricks(client, name):
    for response in (client.get(f"/sessions/{name}"), client.post(f"/sessions/{name}/reset")):
        assert response.status_code in (400, 404)
        refusal(response, response.status_code)
    if "%" not in name:
        refusal(client.post("/sessions", json={"name": name}), 400)


def test_names_that_are_taken_or_unknown(client):
    assert client.post("/sessions", json={"name": "mine"}).json()["name"] == "mine"
    assert "already" in refusal(client.post("/sessions", json={"name": "mine"}), 409)
    assert "no conversation named nobody" in refusal(client.get("/sessions/nobody"), 404)
    refusal(client.post("/sessions/nobody/say", json={"message": "x"}), 404)
    refusal(client.post("/sessions", json={"name": 5}), 400)


def test_one_answer_at_a_time(client, monkeypatch):
    name = web.new(client)
    web.slowly(monkeypatch)
    with client.stream("POST", f"/sessions/{name}/say", json={"message": "x", "max_tokens": 4096}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert "busy" in refusal(client.post(f"/sessions/{name}/say", json={"message": "y"}), 409)
        assert client.get(f"/sessions/{name}/strip").status_code == 200
        assert client.get(f"/sessions/{name}/messages").status_code == 200


def test_a_window_that_is_full():
    with web.serving(plain_chat(64)) as (client, _):
        name = web.new(client)
        sentence = refusal(client.post(f"/sessions/{name}/say", json={"message": "x" * 80}), 400)
        assert "window holds 64" in sentence
        web.say(client, name, "x" * 20)
        body = {"messages": [{"role": "user", "content": "x" * 90}]}
        for path in ("/chat/completions", "/v1/chat/completions"):
            assert "window holds 64" in refusal(client.post(path, json=body), 400)


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


def test_clients_take_turns(client):
    spread(client, 8, 8)
    seconds = spread(client, 8, 400)
    assert max(seconds) < 2 * min(seconds)


def test_a_long_text_does_not_hold_up_an_answer():
    with web.serving(focus_chat(lens="learned"), upload_mb=4) as (client, _):
        reader, talker = web.new(client), web.new(client)
        web.say(client, talker)
        over = threading.Event()

        def read() -> None:
            client.post(f"/sessions/{reader}/documents", content="A town by the sea.\n" * 30_000)
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
        assert strip["edits"]["relayouts"] == 1
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
    for name, chat in (("plain", plain_chat(512)), ("working context", focus_chat(lens="learned"))):
        with web.serving(chat, options=ChatConfig(temperature=1.0)) as (client, server):
            spread(client, 4, 8)
            before = psutil.Process().memory_info().rss
            seconds = spread(client, 64, 128)
            after = psutil.Process().memory_info().rss
            print(
                f"\n{name}: {len(seconds)} of 64 answers of 128 tokens in {max(seconds):.1f} s, slowest/fastest {max(seconds) / min(seconds):.2f}, "
                f"memory {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after, {len(server.book)} conversations open"
            )
            assert max(seconds) < 2 * min(seconds)
            assert after - before < 300e6
