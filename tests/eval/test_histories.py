"""Facts in long histories: what is asked, how a session reads, that finished cells are kept."""

import json

import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.eval.longcontext import histories
from megacontext_jax.eval.longcontext.models import Size
from megacontext_jax.eval.longcontext.tasks import DIGITS, MARKS
from scripts import long_history_eval
from tests.runs import flags

TINY = Size(depth=1, width=32, heads=2, steps=3, rows=2)


@pytest.mark.parametrize("depth", histories.DEPTHS)
def test_the_facts_are_where_they_are_said_to_be(depth):
    history = histories.make_history(np.random.default_rng(0), 1000, depth)
    places = np.flatnonzero(history.ids_T < MARKS)
    assert sorted(history.marks) == sorted(history.ids_T[places])
    assert len(set(history.marks)) == histories.FACTS
    begin = depth * (1000 - histories.SPREAD)
    assert ((begin - 2 <= places) & (places <= begin + histories.SPREAD)).all()
    told = dict(zip(history.ids_T[places].tolist(), history.ids_T[places + 1].tolist(), strict=True))
    assert told == dict(zip(history.marks.tolist(), history.numbers.tolist(), strict=True))
    others = np.delete(history.ids_T, np.concatenate([places, places + 1]))
    assert (others >= MARKS + DIGITS).all()  # nothing else looks like a fact


def test_cells_that_are_done_are_not_run_again(tmp_path, monkeypatch):
    def run(lengths):
        told = lambda step, loss: steps.append(step)  # noqa: E731
        return list(histories.run(TINY, 1, lengths, 1, tmp_path, told))

    steps: list[int] = []
    first = run([300])
    assert steps == [1, 2, 3]
    assert [depth for _, depth, _ in first] == list(histories.DEPTHS)
    assert all(0 <= share <= 1 for *_, cell in first for share in cell.values())
    asked = []
    ask = histories.ask
    monkeypatch.setattr(histories, "ask", lambda *words: asked.append(words[1:3]) or ask(*words))
    again = run([300, 400])
    assert steps == [1, 2, 3]  # the model is kept too
    assert asked == [(400, depth) for depth in histories.DEPTHS]
    assert again[: len(first)] == first
    assert len(json.loads((tmp_path / histories.RESULTS).read_text())["cells"]) == 2 * len(histories.DEPTHS)
    cells = {(tokens, depth): found for tokens, depth, found in again}
    assert histories.draw(cells, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_bad_lengths_are_refused():
    for words, sentence in (
        (("--history-tokens", "20"), "shortest history is 256"),
        (("--history-tokens", "a"), "whole numbers"),
        (("--history-count", "0"), "at least 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            long_history_eval.main(flags(*words))
