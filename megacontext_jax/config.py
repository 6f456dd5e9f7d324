"""One configuration: a tree of dataclasses, filled from YAML and the command line.

Precedence: the defaults below (nanochat's classic recipe), `configs/archs/<arch>.yaml` (how an architecture is
trained), `configs/<recipe>.yaml` (how much and on what), flags. Every script takes every flag, so a recipe hands its arguments to all stages; a name nobody knows is an error. In a
training script `--num-iterations` means that stage's; `--base.num-iterations` names one stage from anywhere.
Dashes and underscores are the same.
"""

import difflib
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import yaml

from megacontext_jax.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def option(default, help: str, *, free: bool = False, choices: tuple = ()):
    """A configuration field. `free` ones may change when a run is resumed, the others may not."""
    return field(default=default, metadata={"help": help, "free": free, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    recipe: str = option("", "which recipe this is part of", free=True)
    run: str = option("", "wandb run name (default: the run folder); dummy = no wandb", free=True)
    tag: str = option("", "checkpoint tag (default d<depth>)", free=True)
    mc: bool = option(False, "with MegaContext: gists, working contexts, lens")
    dry_run: bool = option(False, "print the plan and stop (recipes)", free=True)
    print_tag: bool = option(
        False, "print the checkpoint tag of this recipe, below it mc or vanilla, and stop (plan)", free=True
    )
    fresh: bool = option(False, "start this stage again under a new tag; deletes nothing", free=True)
    seed: int = option(42, "seed of every random choice")
    platform: str = option("", "cpu or gpu (default: what JAX finds)", free=True, choices=("", "cpu", "gpu"))
    compute_dtype: str = option(
        "auto",
        "activations: auto = bfloat16 on GPUs, float32 on CPUs",
        choices=("auto", "float32", "bfloat16"),
    )
    attention_impl: str = option(
        "auto",
        "auto, blocked, cudnn, xla or reference; with --attention gist auto, mosaic_gpu, xla or reference",
        free=True,
    )
    require_fused: bool = option(
        False,
        "gist attention: an error where no fused kernel trains and reads prompts, instead of the XLA path",
        free=True,
    )
    remat: str = option("none", "recompute in the backward pass", free=True, choices=("none", "dots", "full"))
    data_axis: int = option(-1, "devices along the data axis; -1 = the rest", free=True)
    fsdp_axis: int = option(1, "devices that share parameters and optimiser state", free=True)
    tensor_axis: int = option(1, "devices that split heads and hidden units", free=True)
    coordinator: str = option("", "host:port of process 0 for a multi-process run", free=True)
    num_processes: int = option(0, "processes in all, with --coordinator", free=True)
    process_id: int = option(-1, "this process, with --coordinator", free=True)
    min_devices: int = option(1, "accelerators this recipe needs", free=True)
    min_device_memory_gb: int = option(0, "memory per accelerator this recipe needs, GB", free=True)


@dataclass(frozen=True)
class DataConfig:
    data_dir: str = option("", "train on your own folder of .parquet, .jsonl or .txt files", free=True)
    dataset: str = option(
        "builtin",
        "builtin, fineweb_edu or climbmix",
        choices=("builtin", "fineweb_edu", "climbmix"),
    )
    num_shards: int = option(8, "real shards to download", free=True)
    base_url: str = option("", "where the real shards are (default: the hub)", free=True)
    corpus_seed: int = option(0, "seed of the built-in corpus")
    corpus_mchars: float = option(20.0, "built-in corpus: million characters of pretraining text")
    mid_conversations: int = option(44_000, "built-in corpus: conversations for mid-training")
    sft_conversations: int = option(16_000, "built-in corpus: conversations for SFT")
    packing: str = option("concat", "how documents fill rows", choices=("concat", "best_fit"))
    workers: int = option(0, "tokeniser processes; 0 = a thread", free=True)


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = option(65536, "vocabulary, special tokens included")
    max_chars: int = option(2_000_000_000, "characters to train on")
    doc_cap: int = option(10_000, "characters taken of each document")


@dataclass(frozen=True)
class ModelConfig:
    arch: str = option(
        "classic", "generation of nanochat: classic, era2, era3, era3b, era4 or latest; or pocket (CPU)"
    )
    depth: int = option(20, "layers; width, heads, batch and horizon follow")
    aspect_ratio: int = option(64, "width = depth * aspect_ratio")
    head_dim: int = option(128, "channels per head")
    n_kv_head: int = option(0, "key/value heads; 0 = as many as heads")
    max_seq_len: int = option(2048, "tokens per row")
    window_pattern: str = option(
        "", "S (short window) and L (long) over the layers; empty = the architecture's"
    )
    softcap: float = option(0.0, "cap of the logits; 0 = the architecture's")
    rope_share: float = option(
        1.0, "share of the channels that turn with the position; what is far is found by the others"
    )
    attention: str = option(
        "",
        "who sees whom: dense, sliding or gist; empty = as the model was trained, dense for a new one",
        choices=("", "dense", "sliding", "gist"),
    )
    gist_window: int = option(256, "gist attention: tokens before its own block that a token sees as tokens")
    gist_mid_spans: int = option(1, "gist attention: spans of the next level still shown in a level's detail")
    gist_levels: int = option(2, "gist attention: levels above the tokens; --block-size tokens make a gist")
    gist_positions: str = option(
        "gaussian",
        "gist attention: gaussian (phases damped by the span) or plain; rank belongs to --mc --positional-type",
    )
    gist_gap: int = option(
        0,
        "gist attention, training: longest gap put between near and far rows, so that far gists are seen at every distance; "
        "0 = none",
    )
    gist_site: str = option("kv", "kv: gists in every layer; embedding is refused, --mc trains such gists")


@dataclass(frozen=True)
class StageConfig:
    """One training stage. -1 in a horizon means: derive it."""

    num_iterations: int = option(-1, "steps; -1 = derive")
    target_flops: float = option(-1.0, "steps from a FLOP budget")
    target_param_data_ratio: float = option(20.0, "steps from tokens per parameter")
    num_epochs: int = option(1, "passes over the conversations (mid, sft)")
    device_batch_size: int = option(32, "rows per device and micro-batch", free=True)
    total_batch_size: int = option(
        524_288, "tokens per step over all devices; -1 = from the horizon (base), 2^19 (mid, sft)"
    )
    optimizer: str = option(
        "muon",
        "muon (matrices) with AdamW, adamw for all, as in a generation of nanochat, or pocket (muon with decay)",
        choices=("muon", "adamw", "era2", "era3", "era3b", "era4", "latest", "pocket"),
    )
    matrix_lr: float = option(0.02, "learning rate of the matrices")
    embedding_lr: float = option(0.2, "learning rate of the embedding")
    unembedding_lr: float = option(0.004, "learning rate of the head")
    scalar_lr: float = option(0.2, "learning rate of gates and scalars, where the architecture has them")
    context_lr: float = option(0.003, "learning rate of the heads of GistNet and LensNet")
    init_lr_frac: float = option(1.0, "factor on every learning rate")
    weight_decay: float = option(
        0.0, "of the AdamW groups (muon, adamw); of Muon's matrices (era2 and later, pocket)"
    )
    adam_beta1: float = option(0.8, "AdamW")
    adam_beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "global norm; 0 = off")
    warmup_ratio: float = option(0.0, "share of the steps")
    warmup_steps: int = option(0, "steps, in place of the share")
    warmdown_ratio: float = option(0.2, "share of the steps")
    final_lr_frac: float = option(0.0, "learning rate at the end, as a share")
    chat_packing: str = option(
        "stream",
        "conversations end to end, whole in rows, or whole in padded rows (mid, sft)",
        choices=("stream", "rows", "pad"),
    )
    mask_prompts: bool = option(False, "loss on the assistant's tokens only (mid, sft)")
    curriculum: bool = option(False, "keep the conversations in file order (mid, sft)")
    eval_every: int = option(250, "steps between validations; -1 = only at the end", free=True)
    eval_tokens: int = option(20 * 524_288, "tokens per validation", free=True)
    sample_every: int = option(2000, "steps between samples; -1 = only at the end", free=True)
    save_every: int = option(1000, "steps between checkpoints; -1 = only at the end", free=True)
    keep: int = option(2, "checkpoints kept", free=True)
    log_every: int = option(10, "steps between log lines", free=True)


@dataclass(frozen=True)
class MegaContextConfig:
    """Everything of --mc; names are those of the PyTorch fork. -1 means: derive it."""

    block_size: int = option(32, "tokens per gist; also gists per gist of the next level")
    mc_levels: int = option(2, "levels of gists")
    gistnet_type: str = option("transformer", "how a block becomes a gist", choices=("transformer", "mean"))
    gistnet_layers: int = option(2, "layers of GistNet")
    gistnet_pooling: str = option("mean", "from vectors to one", choices=("mean", "query", "cls"))
    gistnet_head: str = option("mlp", "after pooling", choices=("mlp", "linear"))
    lensnet_type: str = option("transformer", "how entries are scored", choices=("transformer",))
    lensnet_layers: int = option(2, "layers of LensNet")
    lensnet_head: str = option("mlp", "from states to scores", choices=("mlp", "linear"))
    positional_type: str = option("gaussian", "gaussian, simple, gaussian_alibi or rank")
    mc_aux_dtype: str = option(
        "auto", "activations of GistNet and LensNet; auto = the model's", choices=("auto", "fp32", "bf16")
    )
    mc_freeze_base: bool = option(False, "train GistNet and LensNet only")
    # working contexts in training
    mc_train_wc_length: int = option(-1, "entries at the end of the curriculum; -1 = a quarter of the row")
    mc_num_random_variants: int = option(2, "working contexts per sequence, beside the raw one")
    mc_raw_share: float = option(
        0.1, "share of a first stage's steps on raw rows alone, before they (or gist attention) join"
    )
    mc_curriculum_share: float = option(
        0.2, "share of the steps in which they then shrink from 80 % of the row"
    )
    mc_horizon: int = option(32, "H: tokens ahead over which differences in nats are reported")
    mc_gist_delta_weight: float = option(0.0, "extra weight of contexts that do worse than the raw one")
    mc_gist_token_weight: float = option(0.0, "weight of what gists predict, beside raw tokens")
    mc_gist_regression_weight: float = option(
        0.02, "weight of forecasts of the next gist (also with --attention gist)"
    )
    gist_heads: str = option(
        "alike",
        "gist attention: every head reads all of a gist alike, or mostly its own places of the block",
        choices=("alike", "places"),
    )
    mc_forecast: str = option(
        "expected",
        "how the next gist is forecast: the embedding that the next-token distribution expects, or a projection of its own",
        choices=("expected", "direct"),
    )
    mc_lens_loss_weight: float = option(0.1, "weight of LensNet's loss")
    mc_lens_rank_weight: float = option(0.5, "lens: expansions above collapses")
    mc_lens_budget_weight: float = option(0.1, "lens: expansions and collapses in balance")
    mc_lens_margin: float = option(0.1, "lens: by how much")
    mc_lens_collapse_weight: float = option(1.0, "lens: weight of collapses")
    mc_lens_temperature: float = option(1.0, "lens: of the scores")
    mc_lens_kl_weight: float = option(0.0, "lens: towards undecided")
    mc_lens_budget_smooth_weight: float = option(0.0, "lens: balance near its running mean")
    mc_lens_budget_smooth_beta: float = option(0.9, "lens: of that mean")
    mc_lens_hard_negative_ratio: float = option(1.0, "lens: share of the further pairs that is kept")
    mc_max_lens_pairs: int = option(8, "lens: pairs per sequence")
    # the focus allocator
    allocator_type: str = option("greedy", "choice of edits", choices=("greedy", "stochastic_greedy"))
    allocator_soft_max: int = option(-1, "budget in entries; -1 = mc_train_wc_length", free=True)
    allocator_recent_tokens: int = option(
        -1, "newest tokens that stay raw; -1 = 128, at most an eighth of the row"
    )
    allocator_expand_threshold: float = option(0.1, "score from which a gist may expand", free=True)
    allocator_collapse_threshold: float = option(
        0.1, "score (negative) from which a block may collapse", free=True
    )
    allocator_max_replacements: int = option(4, "edits per iteration", free=True)
    allocator_iterations: int = option(2, "iterations per refocus", free=True)
    allocator_sample_top_k: int = option(4, "stochastic_greedy: candidates", free=True)
    allocator_sample_temperature: float = option(1.0, "stochastic_greedy: of the choice", free=True)
    # inference
    mc_lens: str = option(
        "learned",
        "what scores the entries when a model is used",
        free=True,
        choices=("learned", "attention", "lexical", "random", "none"),
    )
    mc_tree: str = option(
        "",
        "where conversations live: ram, or disk, which needs chat_cli's --session or chat_web's --sessions; empty = as "
        "those say. Training and evaluation have the trees of their rows on the device",
        free=True,
        choices=("", "ram", "disk"),
    )
    mc_eval_soft_max_length: int = option(-1, "budget in evaluation; -1 = allocator_soft_max", free=True)
    mc_infer_allocator_max_replacements: int = option(
        -1, "edits per iteration in use; -1 = as above", free=True
    )
    mc_infer_allocator_iterations: int = option(-1, "iterations in use; -1 = as above", free=True)
    mc_infer_refocus_interval: int = option(32, "tokens between refocuses of a conversation", free=True)
    mc_infer_rebuild_max_replacements: int = option(
        -1, "edits per iteration before an answer; -1 = as above", free=True
    )
    mc_infer_rebuild_iterations: int = option(
        -1,
        "most iterations before an answer; -1 = enough to open the oldest gist down to its tokens",
        free=True,
    )
    mc_infer_edit_cost: float = option(
        0.2, "score that an edit must gain per share of the context behind it, made anew", free=True
    )
    mc_infer_recompute: float = option(
        1.5, "entries that edits on the way may make anew, per decoded token on average", free=True
    )
    # memory and telemetry
    mc_auto_batch: bool = option(
        True, "fit micro-batches to the memory the compiled step asks for", free=True
    )
    mc_auto_batch_safety: float = option(1.25, "use 1 / this of the device's memory", free=True)
    mc_train_report: bool = option(False, "describe the working contexts at every log line", free=True)
    mc_val_report: bool = option(True, "describe the working contexts at every validation", free=True)
    mc_log_timers: bool = option(False, "time the stages at every validation", free=True)
    mc_log_lod_ascii_train: bool = option(
        False, "draw a working context of training at every validation", free=True
    )
    mc_log_lod_ascii_val: bool = option(
        False, "draw a focused working context at every validation", free=True
    )
    mc_log_lens_debug: bool = option(False, "print the scores behind it", free=True)
    mc_disable_val: bool = option(False, "no evaluation of MegaContext while training", free=True)


@dataclass(frozen=True)
class EvalConfig:
    source: str = option("sft", "which stage's model", free=True, choices=("base", "mid", "sft", "rl"))
    step: int = option(-1, "checkpoint step; -1 = latest", free=True)
    tasks: str = option("", "task names separated by |; empty = all", free=True)
    eval_seed: int = option(1234, "seed of the held-out questions", free=True)
    num_examples: int = option(200, "questions per task", free=True)
    eval_batch_size: int = option(50, "questions at a time", free=True)
    max_new_tokens: int = option(32, "longest answer, tokens", free=True)
    split_tokens: int = option(200_000, "tokens per split for bits per byte", free=True)
    context_rows: int = option(1024, "rows that judge working contexts, with --mc", free=True)
    suite_steps: int = option(2000, "training steps of each tiny model of the long-context suite", free=True)
    history_tokens: str = option(
        "1000,5000,20000,50000,200000", "lengths of the histories in which a fact is looked for", free=True
    )
    history_count: int = option(8, "histories per length and place of the fact", free=True)


@dataclass(frozen=True)
class ChatConfig:
    prompt: str = option("", "one prompt instead of a conversation", free=True)
    demo: bool = option(False, "ask the demo prompt of the configuration", free=True)
    demo_prompt: str = option("Why is the sky blue?", "what --demo asks", free=True)
    temperature: float = option(0.6, "0 = greedy", free=True)
    top_k: int = option(50, "0 = off", free=True)
    top_p: float = option(1.0, "1 = off", free=True)
    max_tokens: int = option(256, "longest answer, tokens", free=True)
    session: str = option("", "keep the conversation in this folder, or go on with the one there", free=True)


@dataclass(frozen=True)
class WebConfig:
    host: str = option(
        "127.0.0.1", "address to listen on; 0.0.0.0 lets every machine of the network in", free=True
    )
    port: int = option(8000, "port to listen on; 0 = any free one", free=True)
    sessions: str = option(
        "", "keep the page's conversations in this folder, so that they outlive a restart", free=True
    )
    upload_mb: int = option(64, "largest text that can be dropped on the page, MB", free=True)
    max_sessions: int = option(
        64,
        "conversations held ready; beyond, the one unused longest is closed (with --sessions it stays)",
        free=True,
    )
    max_running: int = option(64, "answers at the same time; further ones wait their turn", free=True)
    max_waiting: int = option(256, "requests that may wait; further ones are told to come back", free=True)
    history_mb: int = option(
        4096,
        "memory for conversations without --sessions, MB; beyond, the one unused longest is closed",
        free=True,
    )
    slow_seconds: int = option(
        60,
        "a client that takes in nothing for so long is dropped; its answer waits for it until then",
        free=True,
    )
    allow_origins: str = option(
        "", "other sites whose pages may use this server, separated by commas; * = all", free=True
    )


@dataclass(frozen=True)
class BenchConfig:
    histories: str = option(
        "1000,10000,100000,1000000", "lengths of history, in tokens, separated by commas", free=True
    )
    bench_tokens: int = option(1024, "tokens said and timed at each length", free=True)


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    base: StageConfig = StageConfig()
    mid: StageConfig = StageConfig(grad_clip=0.0, eval_every=150, save_every=-1)
    sft: StageConfig = StageConfig(
        chat_packing="pad",
        mask_prompts=True,
        grad_clip=0.0,
        device_batch_size=4,
        total_batch_size=65_536,
        init_lr_frac=0.02,
        warmdown_ratio=1.0,
        eval_every=100,
        save_every=-1,
    )
    mc: MegaContextConfig = MegaContextConfig()
    eval: EvalConfig = EvalConfig()
    chat: ChatConfig = ChatConfig()
    web: WebConfig = WebConfig()
    bench: BenchConfig = BenchConfig()
    given: frozenset[str] = frozenset()  # what flags (not files) named: "section.key"

    def to_dict(self) -> dict:
        """The sections, JSON-able."""
        return {name: values for name, values in asdict(self).items() if name != "given"}


STAGES = ("base", "mid", "sft")
SOURCE_STAGES = {"mid": ("base",), "sft": ("mid", "base")}  # what a stage starts from, the first that exists


def fixed_options(section) -> dict:
    """The values of a section that a resumed run must share with its checkpoint."""
    return {f.name: getattr(section, f.name) for f in fields(section) if not f.metadata["free"]}


# --------------------------------------------------------------------------------------------------------
# Reading


def load_yaml(config: Config, source: str) -> Config:
    """Overlay a YAML file; `source` is a path or the name of a file in configs/."""
    path = Path(source)
    if not path.suffix:
        path = CONFIG_DIR / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
        raise UserError(f"There is no configuration {source!r}; give a path or one of: {known}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot read the configuration {path}: {reason}; mend the file.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections like 'model:' with keys below them.")
    for section_name, values in tree.items():
        if section_name not in _sections() or not isinstance(values, dict):
            known = ", ".join(_sections())
            raise UserError(f"{path} has an unknown section {section_name!r}; sections are: {known}.")
        for key, value in values.items():
            config = _set(config, section_name, str(key), value, where=f"{path}: {section_name}.{key}")
    return config


def load_arch(config: Config, arch: str) -> Config:
    """Overlay how an architecture is trained; classic is what the defaults are."""
    path = CONFIG_DIR / "archs" / f"{arch}.yaml"
    return load_yaml(config, str(path)) if path.exists() else config


def apply_flags(config: Config, flags: list[tuple[str, str | None]], stage: str | None) -> Config:
    """Overlay command-line flags [(name without dashes, value or None for a switch)]; `given` then names them."""
    for name, value in flags:
        where = f"--{name}"
        section_name, _, key = name.replace("-", "_").rpartition(".")
        targets = [section_name] if section_name else _owners(key, stage)
        if not targets or (section_name and section_name not in _sections()):
            raise UserError(f"Unknown flag {where}.{_suggest(name)} See --help for all flags.")
        for target in targets:
            config = _set(config, target, key, value, where=where)
            config = replace(config, given=config.given | {f"{target}.{key}"})
    return config


def flag_names() -> dict[str, list[str]]:
    """Every flag's plain name and the sections that have it."""
    names: dict[str, list[str]] = {}
    for section_name, section in _sections().items():
        for f in fields(section):
            names.setdefault(f.name, []).append(section_name)
    return names


def is_switch(name: str) -> bool:
    section_name, _, key = name.replace("-", "_").rpartition(".")
    owners = [section_name] if section_name in _sections() else flag_names().get(key, [])
    types_ = [typing.get_type_hints(type(_sections()[o])).get(key) for o in owners]
    return bool(types_) and all(t is bool for t in types_)


def _sections() -> dict:
    default = Config()
    return {
        f.name: getattr(default, f.name) for f in fields(default) if is_dataclass(getattr(default, f.name))
    }


def _owners(key: str, stage: str | None) -> list[str]:
    owners = flag_names().get(key, [])
    if stage in owners and all(o in STAGES for o in owners):
        return [stage]
    return owners


def _suggest(name: str) -> str:
    key = name.replace("-", "_").rpartition(".")[2]
    close = difflib.get_close_matches(key, flag_names(), n=1)
    return f" Did you mean --{close[0].replace('_', '-')}?" if close else ""


def _set(config: Config, section_name: str, key: str, value, *, where: str) -> Config:
    section = getattr(config, section_name)
    known = {f.name: f for f in fields(section)}
    if key not in known:
        raise UserError(f"Unknown key {where}.{_suggest(key)}")
    hint = typing.get_type_hints(type(section))[key]
    parsed = _parse(value, hint, where)
    choices = known[key].metadata["choices"]
    if choices and parsed not in choices:
        words = ", ".join(repr(c) for c in choices)
        raise UserError(f"{where} does not take {value!r}; choose one of {words}.")
    return replace(config, **{section_name: replace(section, **{key: parsed})})


def _parse(value, hint: type | types.UnionType, where: str):
    if hint is bool:
        if value is None or isinstance(value, bool):
            return True if value is None else value
        if str(value).lower() in ("1", "true", "yes", "on"):
            return True
        if str(value).lower() in ("0", "false", "no", "off"):
            return False
        raise UserError(f"{where} is a switch and does not take {value!r}; use true or false.")
    if value is None:
        raise UserError(f"{where} needs a value ({hint.__name__}).")
    if hint is str:
        return str(value)
    try:
        number = float(str(value).replace("_", ""))
        if hint is int:
            if not number.is_integer():
                raise ValueError
            return int(number)
        if number != number:
            raise ValueError
        return number
    except (ValueError, OverflowError):
        kind = "a whole number" if hint is int else "a number"
        raise UserError(f"{where} needs {kind}, not {value!r}.") from None
