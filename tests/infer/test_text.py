from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.infer.text import TextStream, answer_text
from tests.infer import mocks

TOK = mocks.tokenizer()
CALL, CALLED, OUTPUT, ANSWERED = (
    TOK.special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")
)


def streamed(tokens):
    stream = TextStream(TOK)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_text_comes_out_whole(text):
    pieces = streamed(TOK.encode(text))
    assert "".join(pieces) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, CALL - 1)))
def test_any_tokens_equal_decoding_at_once(tokens):
    assert "".join(streamed(tokens)) == TOK.decode(tokens)


def test_a_character_is_never_cut():
    tokens = list("é€😀".encode())  # one token per byte
    assert streamed(tokens) == ["", "é", "", "", "€", "", "", "", "😀", ""]


def test_what_is_left_incomplete_becomes_a_replacement_character():
    assert streamed(list("€".encode())[:2]) == ["", "", "\ufffd"]
    assert "".join(streamed([0xE2, 65])) == "\ufffdA"


def test_tool_calls_read_as_equations():
    call, result = TOK.encode("12/60"), TOK.encode("0.2")
    tokens = [*TOK.encode("So "), CALL, *call, CALLED, OUTPUT, *result, ANSWERED, *TOK.encode(" it is")]
    assert "".join(streamed(tokens)) == "So [12/60 = 0.2] it is"
    assert "".join(streamed([CALL, *call, CALLED, *TOK.encode("hm")])) == "[12/60]hm"
    assert "".join(streamed([CALL, *call, CALLED])) == "[12/60]"


def test_the_answer_leaves_tools_out():
    tokens = [*TOK.encode("A"), CALL, *TOK.encode("1+1"), CALLED, OUTPUT, *TOK.encode("2"), ANSWERED]
    assert answer_text([*tokens, *TOK.encode(" is it")], TOK) == "A is it"
    assert answer_text([*tokens, CALL, *TOK.encode("cut")], TOK) == "A"
