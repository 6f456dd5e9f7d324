"""The long-context suite: its questions, and a run of one task at a size for tests."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.eval.longcontext import columns, models, suite
from megacontext_jax.eval.longcontext.tasks import HOP_NAMES, KEYS, MARKS, TASKS
from tests import quick

ROWS = 64


def batch_of(task, focused: bool, seed: int = 0) -> dict:
    return task.make(np.random.default_rng(seed), ROWS, task.tokens, focused)


@pytest.mark.parametrize("focused", [False, True])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_batches_ask_at_the_end_and_never_tell(task, focused):
    batch = batch_of(task, focused)
    inputs, targets, facts = (batch[name] for name in ("inputs", "targets", "facts"))
    assert inputs.shape == targets.shape == facts.shape == (ROWS, task.tokens)
    assert inputs.dtype == targets.dtype == np.int32
    assert facts.dtype == bool
    assert inputs.min() >= 0
    assert max(inputs.max(), targets.max()) < task.vocab
    asked = np.zeros(task.tokens, bool)
    asked[-task.asked :] = True
    assert ((targets >= 0) == asked).all()
    questions, answers = inputs[:, asked], targets[:, asked]
    assert not np.isin(answers, questions).any()
    assert not facts[:, asked].any()
    assert facts.any(1).all()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_sequence_asks_in_several_ways(task):
    questions = batch_of(task, focused=False)["inputs"][:, -task.asked :]
    assert np.mean([len(set(row)) >= 2 for row in questions.tolist()]) > 0.95
    assert len({tuple(row) for row in questions.tolist()}) > ROWS / 4


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_same_seed_gives_the_same_batch(task):
    first, again, other = (batch_of(task, True, seed) for seed in (3, 3, 4))
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name])
    assert (first["inputs"] != other["inputs"]).any()


def followers(row: list[int], token: int) -> list[tuple[int, int]]:
    """(place, token behind it) of a token in what is told: pairs begin at even places."""
    return [(i, row[i + 1]) for i in range(0, len(row) - 1, 2) if row[i] == token]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "two_hop"])
def test_the_answer_stands_behind_what_is_asked_and_is_marked(name):
    task = TASKS[name]
    batch = batch_of(task, focused=True)
    for inputs, targets, facts in zip(
        *(batch[x].tolist() for x in ("inputs", "targets", "facts")), strict=True
    ):
        told, marked = inputs[: -task.asked], set()
        for question, answer in zip(inputs[-task.asked :], targets[-task.asked :], strict=True):
            assert question < (KEYS if name.startswith("mqar") else MARKS)
            ((place, told_answer),) = followers(told, question)
            assert told_answer == answer
            marked |= {place, place + 1}
        assert marked == {i for i, fact in enumerate(facts) if fact}
        assert len({place // task.block for place in marked}) == 1  # focused: one block knows


def test_two_hops_lead_to_the_answer_and_the_first_chain_is_marked():
    task = TASKS["two_hop"]
    batch = batch_of(task, focused=True)
    for inputs, targets, facts in zip(
        *(batch[x].tolist() for x in ("inputs", "targets", "facts")), strict=True
    ):
        told, places = inputs[: -task.asked], []
        for question, answer in zip(inputs[-task.asked :], targets[-task.asked :], strict=True):
            ((first, between),) = followers(told, question)
            ((second, end),) = followers(told, between)
            assert end == answer >= HOP_NAMES
            places.append({first, first + 1, second, second + 1})
        assert {i for i, fact in enumerate(facts) if fact} == places[0]


def test_tasks_are_chosen_by_name():
    assert suite.choose("") == list(TASKS.values())
    assert [task.name for task in suite.choose("two_hop, mqar_4x|")] == ["two_hop", "mqar_4x"]
    with pytest.raises(UserError, match=r"no task nonsense, passkey_3x; choose from mqar_4x") as error:
        suite.choose("nonsense|mqar_4x|passkey_3x")
    assert "\n" not in str(error.value)


SIZE = models.Size(depth=1, row_depth=1, width=32, heads=2, steps=2, rows=8)
RUN = """
import sys
from pathlib import Path
from megacontext_jax.eval.longcontext import columns, models, suite
from tests.eval.test_longcontext import SIZE
columns.QUESTIONS = suite.QUESTIONS = columns.ROWS  # one batch
for run in (suite.run, suite.run_rows):
    run(suite.choose("mqar_4x"), SIZE, 0, Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what was said) of a run of one task."""
    folder = tmp_path_factory.mktemp("suite")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": quick.FLAGS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_a_run_fills_every_column(ran):
    folder, said = ran
    results, notes = json.loads((folder / suite.RESULTS).read_text()), suite.read_notes(folder)
    (row,) = results.values()
    far = {column + columns.FAR for column in columns.ATTENTIONS}  # one layer with a window of 8 has some
    gap = "gist_attention" + columns.GAP
    assert set(row) == {*columns.COLUMNS, *columns.ATTENTIONS, *far, gap, "chance"}
    assert row["chance"] == 1 / 32
    assert all(0 <= accuracy <= 1 for accuracy in row.values())
    assert notes["mqar_4x"]["entries"] == {"gists alone": 12, "budget": 15}
    assert notes["mqar_4x"]["keys per token"] == 4 + 5  # its own block, and all earlier ones as gists
    assert (folder / notes["mqar_4x"]["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "mqar_4x: full " in said
    table = suite.table(results, notes)
    assert [len(cells) for cells in table] == [len(table[0])] * 2
    assert "-" not in table[1]


def test_a_far_fact_is_one_that_no_window_hands_on():
    """The last token depends on nothing further back than the reach, and on what lies there."""
    objective = models.rows_for(TASKS["passkey_1x"], replace(SIZE, row_depth=2), "sliding")
    params = objective.init(jax.random.key(0))
    pull = jax.grad(lambda wte, ids: objective.hidden(params | {"wte": wte}, ids)[0, -1, 0])
    reach = columns._reach(objective.cfg)
    assert reach == 2 * 22 + 1
    for back, pulls in ((reach + 1, False), (reach, True)):
        ids_1T = np.zeros((1, 128), np.int32)
        ids_1T[0, -1 - back] = 1
        assert bool((pull(params["wte"], ids_1T)[1] != 0).any()) == pulls


def test_a_finished_task_is_not_run_again(ran, tmp_path, monkeypatch):
    for name in (suite.RESULTS, suite.NOTES):
        shutil.copy(ran[0] / name, tmp_path)
    trained = []
    monkeypatch.setattr(suite, "QUESTIONS", columns.ROWS)
    monkeypatch.setattr(suite, "train", lambda *args: trained.append(args[2]) or ({}, 0.0))
    monkeypatch.setattr(suite, "evaluate", lambda *args: {})
    monkeypatch.setattr(suite, "draw_focus", lambda *args: tmp_path / "none.png")
    tasks = suite.choose("mqar_4x")
    before = json.loads((tmp_path / suite.RESULTS).read_text())
    assert suite.run(tasks, SIZE, 0, tmp_path) == before
    assert trained == []
    monkeypatch.setattr(suite, "train_rows", lambda *args: trained.append(args[2]) or ({}, 0.0))
    suite.run_rows(tasks, SIZE, 0, tmp_path)
    assert trained == []
    after = suite.run(tasks, replace(SIZE, steps=3), 0, tmp_path)
    assert trained == ["transformer", "mean"]  # another size is another row
    assert "gist_attention" in before["mqar_4x"]
    assert set(after["mqar_4x"]) == {"chance"}  # beside which nothing of the old one stands


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / suite.RESULTS).write_text("{")
    with pytest.raises(UserError, match=suite.RESULTS):
        suite.run([], models.Size(), 0, tmp_path)
