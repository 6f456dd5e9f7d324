import json
import os
import subprocess
import sys

import pytest

from megacontext_jax import config as c
from megacontext_jax.cli import REPLACED, parse
from megacontext_jax.context import setup
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.train.plan import batch_layout, model_of, plan_stage, scaled
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules
from scripts import chat_cli, chat_web, plan
from tests.runs import ROOT
from tests.runs import flags as tiny


def flags(*pairs, stage=None):
    return c.apply_flags(c.Config(), list(pairs), stage)


def test_flags_address_the_stage_at_hand_or_a_named_one():
    config = flags(("num-iterations", "5"), ("mid.matrix_lr", "1e-3"), ("depth", "4"), stage="base")
    assert (config.base.num_iterations, config.mid.num_iterations) == (5, -1)
    assert config.mid.matrix_lr == 1e-3
    assert config.base.matrix_lr == 0.02
    assert config.model.depth == 4
    everywhere = flags(("num-iterations", "7"))
    assert [getattr(everywhere, stage).num_iterations for stage in c.STAGES] == [7, 7, 7]


def test_precedence_is_defaults_then_yaml_then_flags(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  depth: 6\n  head_dim: 64\n")
    config = parse(["--config", str(path), "--head-dim=32"], doc="")
    assert (config.model.depth, config.model.head_dim, config.model.max_seq_len) == (6, 32, 2048)


def test_what_flags_named_is_known_and_what_a_file_says_is_not_among_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mc:\n  mc_levels: 3\n")
    config = parse(
        ["--config", str(path), "--gist-block=8", "--model.depth", "3", "--matrix-lr", "1"],
        doc="",
        stage="mid",
    )
    assert config.given == {"mc.block_size", "model.depth", "mid.matrix_lr"}
    assert "given" not in json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (("dpeth", "3"), ["--dpeth", "--depth"]),
        (("depth", "many"), ["--depth", "whole number"]),
        (("depth", "3.5"), ["--depth", "3.5"]),
        (("depth", None), ["--depth", "value"]),
        (("matrix-lr", "nan"), ["--matrix-lr", "nan"]),
        (("optimizer", "sgd"), ["sgd", "muon", "adamw"]),
        (("fresh", "perhaps"), ["--fresh", "switch"]),
        (("bsae.depth", "3"), ["bsae"]),
    ],
)
def test_a_bad_flag_is_one_sentence_that_names_it(pair, words):
    with pytest.raises(UserError) as error:
        flags(pair)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("model:\n  dpeth: 3\n", "dpeth"),
        ("modle:\n  depth: 3\n", "modle"),
        ("- 1\n", "sections"),
        ("a: [", "a: "),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(tmp_path, text, word):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        c.load_yaml(c.Config(), str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="run10_cpu"):
        c.load_yaml(c.Config(), "no_such_recipe")


def test_words_of_the_command_line():
    config = parse(
        ["--config", "run10_cpu", "-i", "mid", "-p", "-5 + 3?", "--", "--fresh", "--seed=3", "-t", "0"],
        doc="",
    )
    assert config.eval.source == "mid"
    assert config.chat.prompt == "-5 + 3?"
    assert config.run.fresh
    assert config.run.seed == 3
    assert config.chat.temperature == 0.0
    assert not parse(["--config", "run10_cpu", "--fresh", "false"], doc="").run.fresh
    with pytest.raises(UserError, match="stray"):
        parse(["stray"], doc="")


def test_help_explains_the_flags_and_ends(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], doc="Teaches.", stage="base", show=("model",))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Teaches." in text
    assert "--num-iterations" in text
    assert "--depth" in text


@pytest.mark.parametrize("path", sorted(c.CONFIG_DIR.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_a_plan(path):
    config = c.load_yaml(c.Config(), str(path))
    devices = max(1, config.run.min_devices)
    for stage in c.STAGES:
        plan = plan_stage(config, stage, devices, 2)
        assert plan.rows_per_device >= 1
        memory = config.run.min_device_memory_gb * 1e9
        assert not memory or plan.memory_bytes < memory, stage


def test_the_speedrun_is_nanochats():
    config = c.load_yaml(c.Config(), "speedrun")
    plan = plan_stage(config, "base", 8, 2)
    assert model_of(config).num_params()["total"] == 560_988_160
    assert plan.steps == 21_400
    assert plan.tokens == 21_400 * 524_288
    assert plan.accumulation == 1


def test_batches_that_do_not_divide_are_refused():
    opts = c.StageConfig(total_batch_size=4096, device_batch_size=3)
    with pytest.raises(UserError, match="device-batch-size"):
        batch_layout(opts, 256, 1)
    with pytest.raises(UserError, match="total-batch-size"):
        batch_layout(opts, 300, 1)
    assert batch_layout(c.StageConfig(total_batch_size=4096, device_batch_size=32), 256, 8) == (16, 1)


def test_an_architecture_brings_its_recipe_however_it_is_named(tmp_path):
    plain = parse(["--config", "speedrun"], doc="", stage="base")
    assert (plain.base.optimizer, plain.base.total_batch_size, plain.tokenizer.vocab_size) == (
        "muon",
        524_288,
        65_536,
    )
    (tmp_path / "mine.yaml").write_text("model: {arch: latest}\n")
    for words in (
        ["--config", "speedrun", "--arch", "latest"],
        ["--config", "speedrun", "--model.arch", "latest"],
        ["--config", str(tmp_path / "mine.yaml")],
    ):
        config = parse(words, doc="", stage="base")
        assert config.base.optimizer == config.sft.optimizer == "latest"
        assert config.base.total_batch_size == -1
        assert config.base.warmup_steps == 40
    insisted = parse(
        ["--config", "speedrun", "--arch", "latest", "--optimizer", "adamw"], doc="", stage="base"
    )
    assert insisted.base.optimizer == "adamw"


def test_scaling_asks_for_what_is_possible():
    few_heads = parse(["--config", "speedrun", "--depth", "20", "--n-kv-head", "5"], doc="", stage="base")
    assert scaled(few_heads, "base").total_batch_size == 524_288
    latest = parse(["--config", "speedrun", "--arch", "latest", "--n-kv-head", "5"], doc="", stage="base")
    assert scaled(latest, "base").total_batch_size in (2**19, 2**20)
    assert scaled(latest, "mid").total_batch_size == 2**19
    with pytest.raises(UserError, match="-5"):
        scaled(parse(["--total-batch-size", "-5"], doc="", stage="base"), "base")
    both = c.StageConfig(warmup_ratio=0.1, warmup_steps=40)
    with pytest.raises(UserError, match="warmup"):
        schedules(both, RECIPES["muon"], 100, first_stage=True)


# --- MegaContext ----------------------------------------------------------------------------------------

# Flags of the PyTorch fork (base_train and run10.sh), each with a value that its documentation shows.
FORK = """
--mc_enabled=1 --block_size=32 --gist-block 32
--gistnet_type=transformer --gistnet_layers=2 --gistnet_pooling=mean --gistnet_head=mlp --gistnet transformer
--lensnet_type=transformer --lensnet_layers=2 --lensnet_head=mlp --lensnet transformer
--allocator_type=greedy --allocator stochastic_greedy --allocator_soft_max=2048 --allocator_recent_tokens=128
--allocator_expand_threshold=0.1 --allocator_collapse_threshold=0.1 --allocator_max_replacements=4
--allocator_iterations=2 --allocator_sample_top_k=4 --allocator_sample_temperature=1.0
--positional_type=gaussian_alibi --positional simple
--mc_aux_dtype=auto --mc_tree_type=ram --mc_tree ram --mc_lens_loss_weight=0.1
--mc_auto_batch=1 --mc_auto_batch_safety=1.25 --mc_eval_soft_max_length=64
--mc_infer_allocator_max_replacements=4 --mc_infer_allocator_iterations=2 --mc_infer_refocus_interval=32
--mc_infer_rebuild_max_replacements=4 --mc_infer_rebuild_iterations=2
--mc_train_report=0 --mc_val_report=1 --mc_log_timers=0 --mc_log_lod_ascii_train=0 --mc_log_lod_ascii_val=0
--mc_log_lens_debug=0 --mc_disable_val=0
--mc_lens_rank_weight=0.5 --mc_lens_budget_weight=0.1 --mc_lens_margin=0.1 --mc_lens_collapse_weight=1.0
--mc_lens_temperature=1.0 --mc_lens_kl_weight=0.0 --mc_lens_budget_smooth_weight=0.0
--mc_lens_budget_smooth_beta=0.9 --mc_lens_hard_negative_ratio=1.0
--mc_train_wc_length=1536 --mc_num_random_variants=2 --mc_gist_delta_weight=0.1 --mc_max_lens_pairs=8
"""
EMPTY = """
--mc_eval_soft_max_length= --mc_infer_allocator_max_replacements= --mc_infer_allocator_iterations=None
--mc_infer_rebuild_max_replacements= --mc_infer_rebuild_iterations= --mc_train_wc_length=
"""
GONE = "--mc_random_variant_iterations=4 --mc_compile_gistnet=1 --mc-compile-lensnet 1 --mc_lens_adv_norm_beta=0.9"


def mega(*words: str) -> c.MegaContextConfig:
    return parse(["--config", "run10_cpu", *words], doc="", stage="base").mc


def dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


@pytest.mark.parametrize(
    "spell", [str, dashed, lambda word: word.replace("=", " ")], ids=["as is", "-", "apart"]
)
def test_the_forks_flags_are_taken(spell, capsys):
    words = " ".join(map(spell, FORK.split())).split()
    config = parse(["--config", "run10_cpu", *words], doc="", stage="base")
    assert config.run.mc
    assert (config.mc.block_size, config.mc.allocator_type) == (32, "stochastic_greedy")
    assert (config.mc.positional_type, config.mc.mc_tree) == ("simple", "ram")
    assert config.mc.mc_eval_soft_max_length == 64
    assert config.mc.mc_train_wc_length == 1536
    assert config.mc.mc_gist_delta_weight == 0.1
    assert capsys.readouterr().err == ""


def test_flags_reach_the_field_of_their_name():
    assert mega("--gist-block", "8").block_size == 8
    assert mega("--gistnet", "mean").gistnet_type == "mean"
    assert mega("--positional", "rank").positional_type == "rank"
    assert mega("--mc_tree_type", "disk").mc_tree == "disk"
    assert mega("--mc_log_timers").mc_log_timers
    assert not mega("--mc_auto_batch=0").mc_auto_batch
    assert parse(["--config", "run10_cpu", "--mc", "--depth", "3"], doc="").run.mc
    assert not parse(["--config", "run10_cpu", "--mc_enabled=0"], doc="").run.mc


def test_the_allocator_that_never_was_becomes_greedy(capsys):
    insisted = mega("--allocator", "stochastic_greedy", "--allocator", "simple")
    assert insisted.allocator_type == "greedy"
    assert "greedy takes its place" in capsys.readouterr().err


def test_empty_values_mean_derive_it():
    assert mega(*EMPTY.split()) == mega()


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_says_by_what(name, capsys):
    assert mega(f"--{name.replace('-', '_')}=1") == mega(f"--{name}", "1") == mega()
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert f"--{name} is not needed: {REPLACED[name]}." in said


def test_the_forks_own_leftovers_are_all_replaced():
    assert mega(*GONE.split()) == mega()


def test_a_tree_on_disk_belongs_to_conversations(capsys):
    assert (mega().mc_tree, capsys.readouterr().err) == ("", "")
    mega("--mc_tree", "ram")
    assert capsys.readouterr().err == ""
    mega("--mc_tree", "disk")
    assert capsys.readouterr().err.count("rows of a batch have their trees on the device") == 1
    parse(["--config", "run10_cpu", "--mc_tree", "disk"], doc="", show=("chat",))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        (chat_cli, ("--mc_tree", "disk"), "name it with --session FOLDER"),
        (chat_web, ("--mc_tree", "disk"), "name it with --sessions FOLDER"),
        (plan, ("--mc_tree", "disk"), "name it with --session FOLDER"),
        (chat_cli, ("--mc_tree=ram", "--session", "talk"), "--mc-tree ram keeps .* --session talk"),
        (chat_web, ("--mc_tree=ram", "--sessions", "talks"), "--mc-tree ram keeps .* --sessions talks"),
        (chat_cli, ("--mc_tree", "disk", "--session", "talk"), "No checkpoint of a sft run"),
        (chat_web, ("--mc_tree", "ram"), "No checkpoint of a sft run"),
        (chat_cli, ("--session", "talk"), "No checkpoint of a sft run"),
    ],
)
def test_where_conversations_live_is_said_once(script, words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        script.main(tiny(*words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("", "vanilla"),
        ("--mc", "mc"),
        ("--mc=True", "mc"),
        ("--run.mc", "mc"),
        ("--mc_enabled 1", "mc"),
        ("--mc false", "vanilla"),
        ("--mc --mc-enabled=off", "vanilla"),
    ],
)
def test_a_plan_knows_a_recipe_with_megacontext_by_every_spelling(words, kind, capsys):
    plan.main(tiny(*words.split(), "--print-tag"))
    assert capsys.readouterr().out == f"d2\n{kind}\n"


def test_the_recipes_ask_the_plan(tmp_path):
    program = (
        "set -euo pipefail; source scripts/common.sh; setup_env; begin_recipe run10 $WORDS >/dev/null; "
        'printf "%s " "$TAG"; if with_mc; then echo yes; else echo no; fi'
    )
    words = "--config tests/tiny.yaml --mc_enabled 1 --tag mine"
    env = os.environ | {"MEGACONTEXT_PYTHON": sys.executable, "WORDS": words}
    done = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "mine yes", done.stderr


def test_a_recipe_refuses_positions_that_its_chat_cannot_have():
    with pytest.raises(UserError, match="gaussian_alibi does not get through a recipe"):
        plan.main(tiny("--mc", "--positional", "gaussian_alibi", "--dry-run"))
    plan.main(tiny("--positional", "gaussian_alibi", "--print-tag"))


def context_of(**options):
    opts, model = (
        c.MegaContextConfig(block_size=4, **options),
        GPTConfig(sequence_len=64, n_embd=32, n_head=2, n_kv_head=2),
    )
    parts = setup.context_config(opts, model)
    setup.limits(opts, parts, 64)
    setup.mixture(opts, 64)
    setup.final_width(opts, parts, 64)
    setup.budget(opts, parts, 64)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mc_train_wc_length": 65}, "--mc-train-wc-length 65"),
        ({"mc_train_wc_length": 8}, "64 tokens cannot be shown in 8 entries"),
        ({"allocator_soft_max": 8}, "64 tokens cannot be shown in 8 entries"),
        ({"allocator_soft_max": 0}, "--allocator-soft-max 0 must be at least 1"),
        ({"mc_eval_soft_max_length": 8, "allocator_soft_max": 60}, "64 tokens cannot be shown in 8 entries"),
        ({"mc_eval_soft_max_length": -2}, "--mc-eval-soft-max-length -2 must be at least 1"),
        ({"mc_levels": 0}, "--mc-levels"),
        ({"mc_horizon": 64}, "--mc-horizon 64"),
        ({"gistnet_layers": 0}, "--gistnet-layers"),
        ({"positional_type": "rotary"}, "'rotary' is unknown; choose one of gaussian, simple"),
        ({"positional_type": "gaussian_lod2d"}, "'gaussian_lod2d' has more channels than a head"),
        ({"positional_type": "gaussian_lod2d_alibi"}, "has more channels than a head"),
        ({"mc_num_random_variants": -1}, "--mc-num-random-variants"),
        ({"mc_num_random_variants": 0}, "--mc-num-random-variants 0 makes no working contexts"),
        ({"mc_lens_temperature": 0.0}, "--mc-lens-temperature"),
        ({"mc_lens_hard_negative_ratio": 0.0}, "--mc-lens-hard-negative-ratio"),
        ({"mc_lens_budget_smooth_beta": 1.0}, "--mc-lens-budget-smooth-beta"),
        ({"mc_raw_share": 1.5}, "--mc-raw-share"),
    ],
)
def test_a_megacontext_that_cannot_be_is_one_sentence(options, word):
    context_of(mc_horizon=8)  # the rest can be
    with pytest.raises(UserError) as error:
        context_of(**{"mc_horizon": 8} | options)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("--block-size", "1"), "--block-size 1"),
        (("--mc-lens", "psychic"), "psychic"),
        (("--gistnet", "rnn"), "rnn"),
        (("--mc_max_lens_pairs=many",), "whole number"),
        (("--mc_lens_margn=1",), "--mc-lens-margin"),
        (("--allocator", "clever"), "clever"),
    ],
)
def test_a_bad_megacontext_flag_is_one_sentence(words, word):
    model = GPTConfig(sequence_len=64, n_embd=32, n_head=2, n_kv_head=2)
    with pytest.raises(UserError) as error:
        setup.context_config(mega(*words), model)
    assert word in str(error.value)
    assert "\n" not in str(error.value)
