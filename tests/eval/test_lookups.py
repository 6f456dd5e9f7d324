"""What counts as a lookup, on rows small enough to count by hand."""

from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext_jax.eval.lookups import lookups, world_tokens

WORDS = set(range(10, 20))
END = 1


def of(text, block=4):
    return lookups(text[:-1], text[1:], WORDS, block)


def test_a_pair_that_comes_back_is_one():
    #       0   1   2    3   4   5    6   7    8   9
    text = [10, 11, END, 12, 13, END, 12, 13, END, 10, 11]
    found = of(text)
    assert found.at.tolist() == [6, 9]
    assert found.distance.tolist() == [3, 9]
    assert found.parted.tolist() == [True, False]  # 12 | 13: a block of four ends between them
    assert found.shared.tolist() == [True, False]  # 13 at 4, and 13 at 7


def test_another_answer_is_none_and_the_newest_counts():
    assert of([10, 11, END, 10, 12]).at.size == 0
    text = [10, 11, END, 10, 12, END, 10, 12]
    assert of(text).at.tolist() == [6]
    assert of(text).distance.tolist() == [3]
    assert of([10, 11, END, 10, 12, END, 10, 11]).at.size == 0


def test_only_words_of_the_world():
    assert of([2, 3, END, 2, 3]).at.size == 0
    assert of([10, 3, END, 10, 3]).at.size == 0


@settings(deadline=None)
@given(st.lists(st.integers(8, 14), min_size=2, max_size=60), st.integers(2, 5))
def test_what_is_found_is_there(text, block):
    row, targets = text[:-1], text[1:]
    for t, distance, parted, shared in zip(*lookups(row, targets, WORDS, block), strict=True):
        stood = t + 1 - distance
        assert row[stood - 1] == row[t]
        assert row[stood] == targets[t]
        assert parted == (stood // block != (stood - 1) // block)
        first = stood // block * block
        pairs = [
            s for s in range(max(1, first), min(first + block, len(text))) if {text[s - 1], text[s]} <= WORDS
        ]
        assert shared == (len(pairs) > 1)


def test_words_are_single_tokens():
    class Letters:
        def encode(self, text):
            return [len(text)] if len(text) < 5 else [0, 1]

    assert world_tokens(Letters()) == {4}  # " Ida", " mill" is two
