"""The web server: every endpoint, what it lets in and what it refuses."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.errors import UserError
from megacontext_jax.infer.server import work
from megacontext_jax.infer.server.openai_api import StopText
from scripts import chat_web
from tests.infer import web
from tests.infer.session_models import TOK, plain_chat
from tests.infer.web import refusal


@pytest.fixture(scope="module")
def served():
    with web.serving(upload_mb=1) as found:
        yield found


@pytest.fixture
def client(served):
    return served[0]


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


def test_pages_of_sites_that_are_named_are_let_in():
    with web.serving(allow_origins="http://friend.example") as (client, _):
        answer = client.post("/sessions", headers={"origin": "http://friend.example"})
        assert answer.headers["access-control-allow-origin"] == "http://friend.example"
        refusal(client.post("/sessions", headers={"origin": "http://evil.example"}), 403)


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


# --- the program ---


def test_the_script_explains_itself_and_what_it_does_not_take(capsys):
    with pytest.raises(SystemExit):
        chat_web.main(["--config", "run10_cpu", "--help"])
    text = capsys.readouterr().out
    for words in ("-p, --port", "--sessions ", "--upload-mb", "--max-running", "http://127.0.0.1:8000/"):
        assert words in text
    with pytest.raises(UserError, match="--sessions FOLDER"):
        chat_web.main(["--config", "run10_cpu", "-n", "2", "--session", "x"])
    assert "--num-gpus is not needed" in capsys.readouterr().err
    with pytest.raises(UserError, match="chat_cli"):
        chat_web.main(["--config", "run10_cpu", "--prompt", "x"])
