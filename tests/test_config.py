import pytest

from megacontext_jax import config as c
from megacontext_jax.cli import parse
from megacontext_jax.errors import UserError
from megacontext_jax.train.plan import batch_layout, model_of, plan_stage, scaled
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules


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
