"""Sessions: what they say is what whole sequences would, whatever was appended and edited; what is kept, and where."""

import shutil
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megacontext_jax.context.layout import Layout, violations
from megacontext_jax.errors import UserError
from megacontext_jax.infer import engine, focus_programs
from megacontext_jax.infer import memory as memory_module
from megacontext_jax.infer.memory import is_alive
from megacontext_jax.infer.session_batch import answer_together
from megacontext_jax.model.loss import capped_logits
from tests.infer.session_models import (
    BUDGET,
    MAX_LEVEL,
    RECENT,
    TOK,
    VOCAB,
    K,
    focus_chat,
    plain_chat,
    rows_chat,
    trained_rows,
    whole_focus_logits,
)

LONGEST = 256


def random_history(session, rng, steps: int):
    """Appends texts and lets the model speak, in any order; yields after each."""
    for _ in range(steps):
        if len(session) > LONGEST - 80:
            return
        if rng.random() < 0.5 or not len(session):
            session.append(rng.integers(0, 250, int(rng.choice([1, 3, 17, 40, 60])), np.uint32))
            session.read()
        else:
            seed = int(rng.integers(1000))
            list(session.answer(max_tokens=int(rng.integers(1, 20)), temperature=1.5, seed=seed))
        yield


KINDS = [("pocket", "gaussian", "random"), ("latest", "simple", "learned"), ("pocket", "rank", "lexical")]


@pytest.mark.parametrize(("arch", "positions", "lens"), KINDS)
def test_a_working_context_says_what_it_would_as_a_whole(arch, positions, lens):
    chat = focus_chat(arch, lens, positions)
    worst, compressed, statistics = contexts_against_whole(chat, range(3), 12)
    assert worst < 1e-4
    assert compressed > 10
    assert statistics["kept"] > 0
    assert statistics["collapses"] > 0


def contexts_against_whole(chat, seeds, steps: int):
    """(largest difference of a logit, how many contexts had gists, statistics of the last session)."""
    worst, compressed = 0.0, 0
    for seed in seeds:
        with chat.new_session() as session:
            for _ in random_history(session, np.random.default_rng(seed), steps):
                expected = whole_focus_logits(chat, session, LONGEST)
                found = np.asarray(session.memory.logits_1V)
                worst = max(worst, np.abs(found - expected).max())
                compressed += session.memory._level.any()
                check_layout(session)
            statistics = session.memory.statistics()
    return worst, compressed, statistics


def check_layout(session):
    memory = session.memory
    level, node = (jnp.asarray(x)[None] for x in (memory._level, memory._node))
    layout = Layout(level, node, jnp.ones(level.shape, bool))
    # between refocuses new tokens are beside the budget
    budget = BUDGET + memory._since
    found = violations(
        layout, block=K, tokens=len(session), budget=budget, recent=RECENT, max_level=MAX_LEVEL
    )
    assert not any(bool(x.any()) for x in found.values()), found


def test_nothing_before_an_edit_is_computed_again():
    chat = focus_chat(lens="none")
    with chat.new_session() as session:
        session.append(np.arange(60, dtype=np.uint32))
        session.read()
        before, keys = session.memory.statistics(), np.asarray(session.memory.cache.k[0])
        shown = list(zip(session.memory._level, session.memory._node, strict=True))
        session.append(np.arange(3, dtype=np.uint32))
        session.read()
        after = session.memory.statistics()
        now = list(zip(session.memory._level, session.memory._node, strict=True))
        same = next(i for i, (a, b) in enumerate(zip(shown, now, strict=False)) if a != b)
        first = min(same, len(now) - session.memory._queries)
        assert first > 0
        np.testing.assert_array_equal(session.memory.cache.k[0][:, :, :first], keys[:, :, :first])
        # the queries that tell where the model looks are always made anew
        assert after["recomputed"]["append"] - before["recomputed"]["append"] <= 3 + session.memory._queries


def test_edits_on_the_way_wait_until_they_are_paid_for():
    made = {}
    for recompute in (0.0, 1.0, 1e9):
        chat = focus_chat(recompute=recompute, iterations=1)
        allocator = replace(chat.focus.allocator, slack=8)
        chat = replace(chat, focus=replace(chat.focus, allocator=allocator))
        with chat.new_session() as session:
            session.append(np.arange(100, dtype=np.uint32))
            session.read()
            before = session.memory.statistics()["recomputed"]
            list(session.answer(max_tokens=100, temperature=1.5, seed=3))
            after = session.memory.statistics()
            made[recompute] = sum(
                after["recomputed"].get(why, 0) - before.get(why, 0) for why in ("expand", "collapse")
            )
            assert (after.get("unpaid", 0) > 0) == (recompute < 1e9)
            assert after["collapses"] > 0  # the budget is kept whatever it costs
    assert made[0.0] < made[1.0] < made[1e9]


@pytest.mark.parametrize("arch", ["pocket", "latest"])
def test_gist_attention_says_what_it_would_as_a_whole(arch):
    assert rows_against_whole(rows_chat(arch), range(2), 8) < 1e-4


@pytest.mark.parametrize("levels", [1, 2])
def test_conversations_no_longer_than_a_row_are_read_as_in_training(levels):
    """Though a session has more levels."""
    chat, objective, params = trained_rows(gist_levels=levels, sequence_len=160)
    ids_T = np.random.default_rng(0).integers(0, 250, 160, np.uint32)
    x_1TC = jax.jit(objective.hidden)(params, jnp.asarray(ids_T[None], jnp.int32))[0]
    expected_TV = capped_logits(x_1TC, params["lm_head"], objective.cfg.logit_cap, VOCAB)[0]
    assert chat.model.decoder.cfg.gist_levels > levels
    with chat.new_session() as session:
        for piece in np.split(ids_T, range(20, 160, 20)):
            session.append(piece)
            session.read()
            np.testing.assert_allclose(session.memory.logits_1V[0], expected_TV[len(session) - 1], atol=1e-4)


def rows_against_whole(chat, seeds, steps: int) -> float:
    """Largest difference of a logit."""
    decoder = chat.model.decoder
    whole = jax.jit(decoder.prefill)  # of the session's own levels
    worst = 0.0
    for seed in seeds:
        with chat.new_session() as session:
            for _ in random_history(session, np.random.default_rng(seed), steps):
                ids_1T = np.zeros((1, LONGEST), np.int32)
                n = len(session)
                ids_1T[0, :n] = session.tree.tokens()
                expected, _ = whole(chat.model.params, ids_1T, jnp.array([n]), decoder.init_cache(1, LONGEST))
                worst = max(worst, float(jnp.abs(session.memory.logits_1V - expected).max()))
    return worst


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["focus", "rows"])
def test_a_thousand_random_histories(kind):
    """`bash run_tests.sh -m slow tests/infer/test_session.py`: minutes."""
    if kind == "rows":
        worst = rows_against_whole(rows_chat(), range(1000), 6)
    else:
        worst, compressed, _ = contexts_against_whole(focus_chat(), range(1000), 6)
        assert compressed > 1000
    print(f"{kind}: largest difference {worst:.1e}")
    assert worst < 1e-4


def test_sessions_that_take_turns_say_what_they_would_alone():
    options = {"max_tokens": 24, "temperature": 1.0, "tokens_per_sync": 5}
    for chat in (focus_chat(lens="learned"), rows_chat()):
        texts = [np.random.default_rng(i).integers(0, 250, 70 + 40 * i, np.uint32) for i in range(3)]
        alone = []
        for i, text in enumerate(texts):
            with chat.new_session() as session:
                session.append(text)
                alone.append([e.token for e in session.answer(seed=i, **options)])
        sessions, together = [chat.new_session() for _ in texts], [[] for _ in texts]
        for session, text in zip(sessions, texts, strict=True):
            session.append(text)
        steps = [session.stretches(seed=i, **options) for i, session in enumerate(sessions)]
        for turn in zip_longest(*steps, fillvalue=[]):
            for said, events in zip(together, turn, strict=True):
                said += [event.token for event in events]
        assert together == alone


def test_reading_may_be_left_between_two_pieces():
    text = np.random.default_rng(0).integers(0, 250, 200, np.uint32)
    for chat in (focus_chat(lens="random"), rows_chat()):
        with chat.new_session() as session:
            session.append(text[:150])
            next(session.reading())
            session.append(text[150:])
            next(session.reading())
            session.read()
            assert session.memory.tokens == 200
            if chat.focus:
                expected = whole_focus_logits(chat, session, LONGEST)
            else:
                with chat.new_session() as other:
                    other.append(text)
                    other.read()
                    expected = other.memory.logits_1V
            np.testing.assert_allclose(session.memory.logits_1V, expected, atol=1e-4)


def test_short_conversations_are_those_of_the_plain_engine():
    for chat in (focus_chat(lens="learned"), plain_chat(), rows_chat()):
        prompt = [TOK.bos, *TOK.encode("abc def")]
        with chat.new_session() as session:
            session.append(prompt)
            said = [e.token for e in session.answer(max_tokens=12, temperature=0.0)]
            rows, _ = chat.engine.generate_batch([prompt], max_tokens=12, temperature=0.0)
            assert len(rows[0]) - len(prompt) > 5
            assert said[: len(rows[0]) - len(prompt)] == rows[0][len(prompt) :]


def test_a_plain_model_says_where_its_window_ends():
    chat = plain_chat(window=32)
    with chat.new_session() as session:
        session.add_message("x" * 12)
        events = list(session.answer(temperature=1.0, seed=3))
        assert events[-1].stop in ("end", "window")
        with pytest.raises(UserError, match="window holds 32"):
            session.add_message("x" * 40)
        assert len(session) <= 32


def test_turns_are_closed():
    chat = rows_chat()
    with chat.new_session() as session:
        session.add_document("A story.")
        session.add_message("Who?")
        ids = session.tree.tokens().tolist()
        marks = [TOK.special(f"<|{n}|>") for n in ("bos", "user_start", "user_end", "assistant_start")]
        assert [i for i in ids if i in marks] == marks
        assert TOK.decode([i for i in ids if i not in marks]) == "A story.\nWho?"
        list(session.answer(max_tokens=3, temperature=0.0))  # cut
        said = len(session)
        session.add_message("And?")
        opening = session.tree.tokens(said, said + 2).tolist()
        end = TOK.special("<|assistant_end|>")
        assert opening == [end, marks[1]] or session.tree.tokens(said - 1, said)[0] == end


@pytest.mark.parametrize(
    "make", [partial(focus_chat, lens="learned"), rows_chat, plain_chat], ids=["focus", "rows", "plain"]
)
def test_a_session_on_disk_goes_on_where_it_was(make, tmp_path):
    chat, rng = make(), np.random.default_rng(0)
    texts = [rng.integers(0, 250, n, np.uint32) for n in (30, 9, 14)]
    twin = chat.new_session()
    for text in texts:
        with chat.session(tmp_path / "talk") as session:
            session.append(text)
            twin.append(text)
            options = {"max_tokens": 5, "temperature": 0.0}
            said = [e.token for e in session.answer(**options)]
            assert said == [e.token for e in twin.answer(**options)]
            if text is texts[1]:
                session.save()
    with chat.session(tmp_path / "talk") as session:
        np.testing.assert_array_equal(session.tree.tokens(), twin.tree.tokens())
        session.read()
    assert chat.model.decoder.vocab_size == VOCAB


def test_opening_a_folder_encodes_nothing_that_reading_will(tmp_path):
    chat = focus_chat()
    with chat.new_session(tmp_path / "a") as session:
        session.append(np.arange(70, dtype=np.uint32))
    with chat.open_session(tmp_path / "a") as session:
        assert session.tree.count(1) == 0
        session.read()
        assert session.tree.count(1) == 70 // K


def test_a_session_of_another_model_is_refused(tmp_path):
    rows_chat().new_session(tmp_path / "a").close()
    with pytest.raises(UserError, match="gist attention, and this is tiny, step 1, plain"):
        plain_chat().session(tmp_path / "a")
    again = rows_chat()
    moved = jax.tree.map(lambda x: x + 1 if x.dtype.kind == "f" else x, again.model.params)
    with pytest.raises(UserError, match="this model with other weights or precision"):
        replace(again, model=again.model._replace(params=moved)).session(tmp_path / "a")
    layers = {
        **again.model.params,
        "lm_head": again.model.params["lm_head"] * 2,
    }  # the embeddings are the same
    with pytest.raises(UserError, match="this model with other weights or precision"):
        replace(again, model=again.model._replace(params=layers)).session(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("mine")
    with pytest.raises(UserError, match="no session"):
        plain_chat().session(tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "mine"


def test_a_damaged_snapshot_is_told_and_read_around(tmp_path):
    chat = rows_chat()
    with chat.new_session(tmp_path / "a") as session:
        session.append(np.arange(70, dtype=np.uint32))
        session.read()
        expected = np.asarray(session.memory.logits_1V)
    (tmp_path / "a" / "memory.npz").write_bytes(b"PK nonsense")
    told = []
    with chat.open_session(tmp_path / "a", told.append) as session:
        session.read()
        np.testing.assert_allclose(session.memory.logits_1V, expected, atol=1e-5)
    assert any("read anew" in line for line in told)


def test_a_snapshot_of_tokens_that_the_disk_has_lost_is_let_go_of(tmp_path):
    chat = rows_chat()
    with chat.new_session(tmp_path / "a") as session:
        session.append(np.arange(70, dtype=np.uint32))
        session.read()
    snapshot = (tmp_path / "a" / "memory.npz").read_bytes()
    shutil.rmtree(tmp_path / "a")
    with chat.new_session(tmp_path / "a") as session:
        session.append(np.arange(100, 150, dtype=np.uint32))
    (tmp_path / "a" / "memory.npz").write_bytes(snapshot)
    with chat.open_session(tmp_path / "a") as session:
        assert session.memory.tokens == 0
        session.append(np.arange(100, dtype=np.uint32))
    assert not (tmp_path / "a" / "memory.npz").exists()  # or it would be taken for these 150


@pytest.mark.parametrize("make", [rows_chat, partial(focus_chat, lens="learned")], ids=["rows", "focus"])
def test_an_interrupt_while_the_device_works_costs_time_alone(make, tmp_path, monkeypatch):
    chat = make()
    with chat.new_session(tmp_path / "a") as session:
        session.append(np.arange(70, dtype=np.uint32))
        session.read()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "jax", SimpleNamespace(**{**vars(jax), "device_get": interrupted}))
            with pytest.raises(KeyboardInterrupt):
                list(session.answer(max_tokens=5))
        assert not is_alive(session.memory.cache)  # consumed by the step that nobody has seen the end of
        said = [event.token for event in session.answer(max_tokens=5, temperature=0.0)]
    with chat.new_session() as session:
        session.append(np.arange(70, dtype=np.uint32))
        assert [event.token for event in session.answer(max_tokens=5, temperature=0.0)] == said


def interrupted(*_):
    raise KeyboardInterrupt


def test_regions_have_the_scores_of_the_last_look_after_it_has_edited():
    chat = focus_chat(lens="learned")
    with chat.new_session() as session:
        session.append(np.arange(120, dtype=np.uint32))
        session.read()
        assert session.memory.edits["collapses"] > 0
        assert all(region.score is not None for region in session.regions())
        list(session.answer(max_tokens=3, temperature=0.0))
        *old, _newest = session.regions()
        assert all(region.score is not None for region in old)
        scores = [region.score for region in old]
        assert min(scores) < max(scores)


@pytest.mark.parametrize(
    "make", [partial(focus_chat, "latest", lens="learned"), rows_chat], ids=["focus", "rows"]
)
def test_sessions_of_a_batch_say_what_each_says_alone(make):
    chat, rng = make(), np.random.default_rng(0)
    sessions, twins = ([chat.new_session() for _ in range(3)] for _ in range(2))
    for turn in range(3):
        for session, twin, n in zip(sessions, twins, (3 + turn, 40, 21), strict=True):
            ids = rng.integers(0, 250, n, np.uint32)
            session.append(ids)
            twin.append(ids)
        # some end earlier than others, and go on in the next turn
        for _ in answer_together(sessions, max_tokens=20, temperature=0.0):
            pass
        for session, twin in zip(sessions, twins, strict=True):
            list(twin.answer(max_tokens=20, temperature=0.0))
            np.testing.assert_array_equal(session.tree.tokens(), twin.tree.tokens())
            np.testing.assert_allclose(session.memory.logits_1V, twin.memory.logits_1V, atol=1e-4)


@pytest.mark.parametrize("make", [focus_chat, rows_chat])
def test_after_a_warm_up_reading_compiles_nothing(make):
    chat = make()
    program = focus_programs.extend if chat.focus else memory_module._extend
    chat.memory().warm_up()
    warm = program._cache_size()
    for tokens in (1, 40, 80, 130):
        with chat.new_session() as session:
            session.append(np.arange(tokens) % 40)
            session.read()
    assert program._cache_size() == warm > 0
