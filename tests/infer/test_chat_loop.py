import io
import signal
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.infer.chat import ChatLoop
from tests.infer import mocks
from tests.infer.mocks import MockDecoder, mock_chat, one_hot_logits, scripted

TOK = mocks.tokenizer()
BOS, USER, USER_END, SPEAK, END = (
    TOK.special(f"<|{name}|>")
    for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
)
GREEDY = SimpleNamespace(temperature=0.0, top_k=0, top_p=1.0, max_tokens=20)


def rendered(*turns):
    conversation = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)
    ]
    return TOK.decode(TOK.render_conversation({"messages": conversation}, 10_000)[0])


def remembered(loop):
    """As text: a model may say with other tokens what the tokenizer would."""
    return TOK.decode(loop.session.tree.tokens().tolist())


def says(text, window=256):
    """A model that says `text` after every assistant_start, byte by byte."""
    data = [*text.encode(), END]
    follows = dict(zip([SPEAK, *data], data, strict=False))  # each byte occurs once
    table = [follows.get(token, END) for token in range(320)]
    return MockDecoder(lambda _, last_B: one_hot_logits(jnp.asarray(table)[last_B]), window=window)


def loop_of(decoder, options=GREEDY, **streams):
    chat = mock_chat(decoder)
    return ChatLoop(chat.new_session(), options, start_over=partial(chat.start_over, None), **streams)


def talk(decoder, *lines, options=GREEDY, ends=EOFError, out=None):
    script = iter(lines)

    def read(prompt):
        asked.append(prompt)
        try:
            return next(script)
        except StopIteration:
            raise ends from None

    asked = []
    out, notes = out or io.StringIO(), io.StringIO()
    loop = loop_of(decoder, options, read=read, out=out, notes=notes)
    assert loop.run() == 0
    assert all("You" in prompt for prompt in asked)
    return loop, out.getvalue(), notes.getvalue()


def test_a_conversation_grows_turn_by_turn():
    loop, out, notes = talk(says("Yes."), "Is it?", "  ", "And <|bos|> now?")
    assert out.count("Assistant: Yes.\n") == 2
    assert notes == ""
    assert remembered(loop) == rendered("Is it?", "Yes.", "And <|bos|> now?", "Yes.")
    assert loop.session.tree.tokens().tolist().count(BOS) == 1  # what a user types is never markup


@pytest.mark.parametrize("word", ["quit", "exit", " QUIT "])
def test_quit(word):
    loop, out, _ = talk(says("Yes."), word, "never asked")
    assert "Assistant" not in out
    assert len(loop.session) == 0


@pytest.mark.parametrize("ends", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_ends_the_program(ends):
    _, out, _ = talk(says("Yes."), "Is it?", ends=ends)
    assert out.endswith("Yes.\n\n")


def test_clear_starts_over():
    loop, _, notes = talk(says("Yes."), "Is it?", "clear", "Or?")
    assert remembered(loop) == rendered("Or?", "Yes.")
    assert notes == "A new conversation.\n"


def test_an_answer_that_is_cut_is_closed_and_explained():
    options = SimpleNamespace(**vars(GREEDY) | {"max_tokens": 3})
    loop, out, notes = talk(says("Yes, sir!"), "Is it?", options=options)
    assert "Assistant: Yes\n" in out
    assert notes == "The answer was cut after 3 tokens (--max-tokens).\n"
    assert remembered(loop) + TOK.decode([END]) == rendered("Is it?", "Yes")  # closed by what is said next


def test_a_model_that_starts_a_new_document_ends_its_answer():
    prompt = 4 + len(TOK.encode("Hi"))
    loop, out, _ = talk(scripted([89, BOS, 65], prompt), "Hi")
    assert "Assistant: Y\n" in out
    assert remembered(loop) == rendered("Hi", "Y")


def test_the_end_of_the_window_is_explained_and_the_conversation_survives():
    _, out, notes = talk(says("abcdefghijkl", window=24), "Is", "More?", "clear", "No")
    first, second = notes.splitlines()
    assert "Assistant: abcdefghijkl\n" in out
    assert first.startswith("With this the conversation takes ")
    assert "window holds 24" in first
    assert "start over (clear)" in first
    assert second == "A new conversation."
    assert out.count("Assistant: abcdefghijkl\n") == 2
    long = "x" * 100
    _, out, notes = talk(says("Yes.", window=24), long)
    assert "Assistant" not in out
    assert notes.startswith("With this the conversation takes 104 tokens, and the model's window holds 24")
    _, out, notes = talk(says("abcdefghijkl", window=14), "Is")
    assert "cut at the end of the model's window of 14 tokens" in notes


class Impatient(io.StringIO):
    """Ctrl-C at the third character of an answer."""

    def write(self, text):
        if text == "c":
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_not_the_program():
    loop, out, notes = talk(says("abcde"), "One", "clear", "Two", out=Impatient())
    assert out.count("Assistant: ab\n") == 2
    assert notes.splitlines() == ["Stopped.", "A new conversation.", "Stopped."]
    assert remembered(loop) == rendered("Two", "abcde")  # the model had said it already


class Pressed(io.StringIO):
    """A real Ctrl-C at the third character of an answer."""

    def write(self, text):
        if text == "c":
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_a_real_ctrl_c_waits_until_nothing_is_half_done():
    before = signal.getsignal(signal.SIGINT)
    loop, out, notes = talk(says("abcdefghijkl"), "One", "Two", out=Pressed())
    assert out.count("Assistant: abc\n") == 2  # what was said is shown, and the next answer comes
    assert notes.splitlines() == ["Stopped.", "Stopped."]
    assert remembered(loop).startswith(rendered("One", "abcdefgh").removesuffix("<|assistant_end|>"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_new_conversation_leaves_the_one_in_the_folder_alone(tmp_path):
    chat, notes = mock_chat(says("Yes.")), io.StringIO()
    folder = tmp_path / "talk"
    script = iter(["One", "/reset", "Two", "/save", "/reset", "quit"])
    loop = ChatLoop(
        chat.session(folder),
        GREEDY,
        start_over=partial(chat.start_over, folder),
        read=lambda prompt: next(script),
        out=io.StringIO(),
        notes=notes,
    )
    loop.run()
    loop.close()
    assert f"The one before is in {folder}.2." in notes.getvalue()
    for name, said in (("talk.1", ("One", "Yes.")), ("talk.2", ("Two", "Yes."))):
        with chat.open_session(tmp_path / name) as session:
            assert TOK.decode(session.tree.tokens().tolist()) == rendered(*said)
    with chat.open_session(folder) as session:
        assert len(session) == 0


def once(decoder, text, out=None, options=GREEDY):
    out, notes = out or io.StringIO(), io.StringIO()
    loop = loop_of(decoder, options, out=out, notes=notes)
    return loop.answer_once(text), out.getvalue(), notes.getvalue()


def test_one_prompt_prints_the_answer_alone():
    assert once(says("Yes."), "Is it?") == (0, "Yes.\n", "")
    assert once(says("abcde"), "Is it?", Impatient())[0] == 130


def test_one_prompt_beyond_the_window_is_refused():
    with pytest.raises(UserError, match="takes 104 tokens, and the model's window holds 24"):
        once(says("Yes.", window=24), "x" * 100)


def test_characters_the_terminal_lacks_do_not_crash():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    loop = loop_of(says("é!"), out=out, notes=io.StringIO())
    loop.answer_once("Is it?")
    assert raw.getvalue() == b"?!\n"


def test_answers_of_one_conversation_draw_anew():
    options = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0, max_tokens=8)
    # whatever was said, the next token is as likely as any other
    loop = loop_of(mocks.uniform(), options, out=io.StringIO(), notes=io.StringIO())
    said = []
    for _ in range(2):
        loop.session.add_message("Hi")
        said.append(loop._stream().tokens)
    assert said[0] != said[1]


def test_commands(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A lantern.")
    loop, out, notes = talk(
        says("Yes."),
        f"/load {book}",
        "Is it?",
        "/focus",
        "/stats",
        "/save",
        "/nonsense",
        "/load",
        "/load /no/where",
    )
    assert "Assistant: Yes.\n" in out
    assert remembered(loop) == rendered("A lantern.\nIs it?", "Yes.")
    assert "Read " in notes
    assert "12 tokens" not in notes
    for line in (
        "tokens  shown as",
        "history: ",
        "start it with --session FOLDER",
        "There is no command /nonsense",
        "/load needs the name of a file",
        "Cannot read /no/where",
    ):
        assert line in notes, line


def test_a_document_comes_before_the_question():
    loop = loop_of(says("Yes."), out=io.StringIO(), notes=io.StringIO())
    assert loop.answer_once("Is it?", "A lantern.") == 0
    assert remembered(loop) == rendered("A lantern.\nIs it?", "Yes.")
