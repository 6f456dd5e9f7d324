"""Training with gist attention through the real scripts: stages, continued, another pattern, judged and asked."""

import shutil
from dataclasses import replace

import pytest

from benchmarks import corpus_attention
from megacontext_jax.cli import parse
from megacontext_jax.context import row_setup
from megacontext_jax.errors import UserError
from megacontext_jax.infer.load import load_model
from megacontext_jax.interop.transfer import export_checkpoint
from megacontext_jax.telemetry import names
from megacontext_jax.train.plan import model_of
from scripts import base_train, chat_eval, mid_train
from tests.runs import N, environment, flags, kill_when_saved, losses, records, run

pytestmark = pytest.mark.usefixtures("quick_to_compile")
ONE_LAYER = ("--depth", "1", "--aspect-ratio", "32", "--gistnet-layers", "1")
GIST = (
    *(*ONE_LAYER, "--attention", "gist", "--block-size", "4", "--gist-window", "8"),
    *("--mc-raw-share", "0.3", "--gist-heads", "places"),
)
RUNS = "gist attention: xla (mosaic_gpu: this machine has no Hopper GPU)"
SHORT = (*ONE_LAYER, "--num-iterations", "3", "--eval-every", "-1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base run with gist attention, and under the tag dense a short one without."""
    folder = tmp_path_factory.mktemp("gists")
    run(folder, "prepare_data")
    run(folder, "tok_train")
    (folder / "said.txt").write_text(run(folder, "base_train", *GIST))
    run(folder, "base_train", "--tag", "dense", *SHORT)
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    for name, value in environment(trained).items():
        monkeypatch.setenv(name, value)
    return trained


def test_a_run_says_what_it_is_and_speaks(trained):
    said = (trained / "said.txt").read_text()
    assert "gist attention (blocks of 4, window 8, 1 middle span(s), 2 level(s), gaussian positions)" in said
    assert RUNS in said
    assert said.count("Compiled the training step") == 2  # dense at first
    assert " -> " in said  # samples
    found = records(trained, "megacontext_base_d1")
    own = {name for record in found for name in record if name.startswith("mc/")}
    assert own == {f"mc/gist_regression_loss{x}" for x in ("", "/level_1", "/level_2")}
    assert {name for record in found for name in record if not names.is_known(name)} == {"time"}
    begin = round(0.3 * N)
    assert [r["step"] for r in found if "mc/gist_regression_loss" in r] == list(range(begin, N))


def test_a_killed_run_continues_to_the_same_losses(trained, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "base", symlinks=True)
    kill_when_saved(tmp_path, "megacontext_base_d1", 6, "base_train", *GIST)
    assert "Continuing megacontext_base_d1 at step" in run(tmp_path, "base_train", *GIST)
    assert losses(tmp_path, "megacontext_base_d1") == losses(trained, "megacontext_base_d1")


def test_later_stages_and_evaluators_keep_the_pattern(trained):
    said = run(trained, "mid_train", *SHORT)
    assert "megacontext_base_d1 has gist attention (blocks of 4, window 8" in said
    assert "begin here" not in said
    said = run(trained, "chat_eval", "-i", "mid", "--num-examples", "2", "-a", "facts")
    assert "accuracy" in said
    assert RUNS in said
    said = run(trained, "base_loss", "-i", "base")
    assert "bits per byte" in said
    assert RUNS in said
    said = run(trained, "chat_cli", "-i", "mid", "--prompt", "2 + 2?")
    assert RUNS in said


def test_another_pattern_is_told(trained):
    said = run(
        trained,
        "base_loss",
        "-i",
        "base",
        "--attention",
        "sliding",
    )
    assert "was trained with gist attention" in said
    assert "here it runs with sliding attention over" in said


def test_a_dense_base_gets_gists_in_a_later_stage(trained):
    said = run(trained, "mid_train", "--tag", "dense", *GIST, "--num-iterations", "3", "--eval-every", "-1")
    assert "megacontext_base_dense was trained with dense attention; here it runs with gist attention" in said
    assert "megacontext_base_dense has no GistNet; they begin here." in said


def test_working_contexts_begin_from_a_base_with_gist_attention(trained):
    """Whose heads read gists each at its places, which there is no use for then."""
    said = run(trained, "mid_train", *SHORT, "--fresh", "--mc", "--attention", "dense", "--mc-disable-val")
    assert "here it runs with dense attention" in said
    assert "megacontext_base_d1 has no LensNet; they begin here." in said


def test_the_benchmark_of_the_corpus_leaves_out_what_a_kind_has_no_use_for():
    given = ["--corpus-mchars", "40", "--gist-heads=places", "--model.gist-window", "32", "--depth", "3"]
    names = [at.rpartition(".")[2] for at in row_setup.IDLE_FLAGS["sliding"]]
    kept = corpus_attention.choose(given, lambda name: name not in names)
    assert kept == ["--corpus-mchars", "40", "--model.gist-window", "32", "--depth", "3"]
    assert corpus_attention.choose(given, lambda name: name == "corpus_mchars") == given[:2]


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        (base_train, (*GIST, "--mc"), "choose one"),
        (base_train, (*GIST, "--gist-site", "embedding"), "--mc trains"),
        (base_train, (*GIST, "--gist-positions", "rank"), "rank"),
        (base_train, (*GIST, "--gist-window", "9"), "multiple of block"),
        (base_train, (*GIST, "--mc-raw-share", "1"), "--mc-raw-share"),
        (base_train, (*GIST, "--require-fused"), "fused kernel is required"),
        (base_train, (*GIST, "--attention-impl", "mosaic_gpu"), "no Hopper GPU"),
        (base_train, (*GIST, "--gist-levels", "3"), "gist_levels"),
        (base_train, (*GIST, "--gist-gap", "-1"), "--gist-gap"),
        (base_train, (*GIST, "--gist-gap", "64"), "gist_gap is 0 there and 64 here"),
        (base_train, (*GIST, "--gist-gap", "64", "--gist-levels", "3"), "no more than one of 64"),
        (base_train, ("--gist-gap", "64"), "add --attention gist"),
        (base_train, ("--gist-heads", "places"), "add --attention gist"),
        (base_train, ("--gist-window", "8"), "--gist-window 8 is for gist attention"),
        (base_train, ("--attention", "sliding", "--require-fused"), "has sliding attention"),
        (base_train, (*GIST, "--head-dim", "32"), "this model has one"),
        (base_train, (*ONE_LAYER, "--mc-freeze-base"), "add --mc or --attention gist"),
        (mid_train, ("--depth", "1", "--head-dim", "32"), "trained with --head-dim 16"),
        (mid_train, ("--depth", "1", "--rope-share", "0.5"), "trained with --rope-share 1.0"),
        (chat_eval, (*GIST, "-i", "base", "--gist-heads", "alike"), "--gist-heads places"),
        (chat_eval, (*GIST, "-i", "base", "--tag", "dense"), "has no GistNet"),
        (chat_eval, (*GIST, "-i", "base", "--block-size", "8"), "--block-size 4"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(here, script, words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        script.main(flags(*words))
    assert "\n" not in str(error.value)


def test_a_model_that_nanochat_cannot_express_is_not_exported(here, tmp_path):
    run_folder = here / "artifacts/megacontext_base_d1"
    with pytest.raises(UserError, match="gist attention, which PyTorch nanochat cannot express"):
        export_checkpoint(run_folder, tmp_path)


def test_a_pattern_stays_but_for_what_flags_name(here):
    for words in ((), ("--attention", "gist")):
        cfg = load_model(parse(flags(*words, "-i", "base"), doc="")).cfg
        assert (cfg.gist_block, cfg.gist_window) == (4, 8)
    wider = load_model(parse(flags("-i", "base", "--gist-window", "16"), doc="")).cfg
    assert (wider.gist_block, wider.gist_window) == (4, 16)
    sliding = load_model(parse(flags("-i", "base", "--attention", "sliding"), doc="")).cfg
    assert (sliding.attention, sliding.gist_block, sliding.gist_window) == ("sliding", 4, 8)


@pytest.mark.parametrize("attention", ["gist", "sliding"])
def test_windows_that_nobody_asked_for_make_room(attention):
    words = ("--arch", "latest", "--attention", attention, "--block-size", "4", "--gist-window", "8")
    config = parse(flags(*words), doc="")
    trained = model_of(config)
    assert trained.window_pattern == "SSSL"
    model, note = row_setup.pattern(config, trained)
    assert (model.attention, model.window_pattern, note) == (attention, "L", "")
    _, note = row_setup.pattern(config, trained, "theirs")
    assert "theirs was trained with dense attention in windows SSSL; here it runs with" in note
    insisted = parse(flags(*words, "--window-pattern", "SL"), doc="")
    with pytest.raises(UserError, match="leave --window-pattern SL out"):
        row_setup.pattern(insisted, model_of(insisted))


def test_a_sliding_window_that_grows_with_the_row_is_told():
    trained = model_of(
        parse(flags("--attention", "sliding", "--block-size", "4", "--gist-window", "8"), doc="")
    )
    config = parse(flags("--max-seq-len", "256"), doc="")
    trained, _ = row_setup.pattern(parse(flags("--attention", "sliding"), doc=""), trained)
    longer = replace(trained, sequence_len=256)
    assert row_setup.pattern(config, trained, "theirs")[1].startswith("theirs has sliding attention over")
    note = row_setup.pattern(config, longer, "theirs", trained)[1]
    before, now = (f"sliding attention over {m.windows()[0] + 1} tokens" for m in (trained, longer))
    assert before != now
    assert f"was trained with {before}; here it runs with {now}" in note


def test_a_model_may_be_judged_with_more_levels(here):
    model = load_model(parse(flags(*GIST, "-i", "base", "--gist-levels", "4"), doc=""))
    assert model.objective.cfg.gist_levels == 4
