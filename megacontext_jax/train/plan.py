"""What a recipe will do on its hardware, from the configuration alone: shapes, tokens, memory, FLOPs."""

import math
from dataclasses import dataclass, replace

from megacontext_jax.config import Config
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig, config_for_depth
from megacontext_jax.train.recipes import RECIPES

REFERENCE_BATCH = 2**19  # tokens per step at depth 12, where nanochat's rates were tuned
REFERENCE_DEPTH = 12


@dataclass(frozen=True)
class StagePlan:
    """One training stage. `tokens` is None where only the data can tell."""

    name: str
    steps: int | None
    tokens_per_step: int
    rows_per_device: int
    accumulation: int
    flops: float | None
    memory_bytes: float  # per device

    @property
    def tokens(self) -> int | None:
        return None if self.steps is None else self.steps * self.tokens_per_step


def model_of(config: Config) -> GPTConfig:
    m = config.model
    return config_for_depth(
        m.depth,
        aspect_ratio=m.aspect_ratio,
        head_dim=m.head_dim,
        n_kv_head=m.n_kv_head,
        arch=m.arch,
        window_pattern=m.window_pattern,
        softcap=m.softcap,
        rope_share=m.rope_share,
        sequence_len=m.max_seq_len,
        vocab_size=config.tokenizer.vocab_size,
    )


@dataclass(frozen=True)
class Scaled:
    """What a stage derives from model, batch and horizon (nanochat's scaling rules)."""

    total_batch_size: int  # tokens per step
    rate_scale: float  # on the learning rates
    weight_decay: float


def scaled(config: Config, stage: str) -> Scaled:
    """Batch, rates and decay of a stage; only pretraining scales them.

    An automatic batch grows with the horizon D as D^0.383 (arXiv 2505.13738) from 2^19 tokens at depth 12, to the
    nearest power of two; rates grow with its root, and the decay keeps batch / (rate * decay * D) as it was.
    """
    opts = getattr(config, stage)
    recipe = RECIPES[opts.optimizer]
    batch, decay = opts.total_batch_size, opts.weight_decay
    if batch < 1 and batch != -1:
        raise UserError(f"--total-batch-size {batch} must be a number of tokens, or -1 to derive it.")
    if stage != "base":
        return Scaled(REFERENCE_BATCH if batch == -1 else batch, 1.0, decay)
    if batch == -1:
        batch = 2 ** round(math.log2(REFERENCE_BATCH * _horizon_ratio(config, recipe.count_all) ** 0.383))
    relative = math.sqrt(batch / REFERENCE_BATCH)
    if recipe.decay_scaling == "depth":
        decay *= (REFERENCE_DEPTH / config.model.depth) ** 2
    elif recipe.decay_scaling == "horizon":
        decay *= relative / _horizon_ratio(config, recipe.count_all)
    return Scaled(batch, relative if recipe.scale_rates else 1.0, decay)


def _horizon_ratio(config: Config, count_all: bool) -> float:
    """Tokens of this model over those of the same at depth 12, at equal tokens per parameter."""
    reference = replace(config, model=replace(config.model, depth=REFERENCE_DEPTH, n_kv_head=0))
    return counted_params(model_of(config), count_all) / counted_params(model_of(reference), count_all)


def counted_params(cfg: GPTConfig, count_all: bool) -> int:
    """The parameters that the tokens per parameter refer to."""
    n = cfg.num_params()
    return n["total"] if count_all else n["transformer"] + n["lm_head"]


def plan_stage(config: Config, stage: str, devices: int, activation_bytes: int) -> StagePlan:
    cfg, batch = model_of(config), scaled(config, stage).total_batch_size
    opts = replace(getattr(config, stage), total_batch_size=batch)
    shards = devices // config.run.tensor_axis
    rows, accumulation = batch_layout(opts, cfg.sequence_len, shards)
    steps = horizon(stage, opts, cfg, None, opts.total_batch_size)
    tokens = opts.total_batch_size
    flops = None if steps is None else float(steps) * tokens * cfg.flops_per_token()
    per_device = rows // shards // accumulation
    memory = memory_estimate(cfg, config, opts, per_device, devices, activation_bytes)
    return StagePlan(stage, steps, tokens, per_device, accumulation, flops, memory)


def memory_estimate(cfg: GPTConfig, config: Config, opts, rows: int, devices: int, width: int) -> float:
    """Bytes per device of a training step: parameters, gradients, optimiser state, activations, logits slice.

    A count, not a measurement: activations per token and layer are the arrays that the backward pass reads
    (36 widths without recomputation, 12 with `dots`, 1 with `full`).
    """
    n = cfg.num_params()
    split = config.run.fsdp_axis * config.run.tensor_axis
    matrices = n["transformer"]
    moments = 1 if RECIPES[opts.optimizer].muon else 2  # Muon's second is a vector per matrix
    state_numbers = 2 * (n["total"] - matrices) + moments * matrices
    weights = 4 * n["total"] * 3 / split  # float32: parameters, gradients, and their sum or the updates
    state = 4 * state_numbers / devices
    kept = {"none": 36, "dots": 12, "full": 1}[config.run.remat]
    tokens = rows * cfg.sequence_len
    activations = tokens * cfg.n_embd * width * (kept * cfg.n_layer + 36)
    logits = 3 * 4 * min(tokens * cfg.vocab_size, 2**27)
    return weights + state + activations + logits


def batch_layout(opts, seq_len: int, shards: int) -> tuple[int, int]:
    """(rows per step over all devices, micro-batches); `device_batch_size` is a ceiling."""
    if opts.total_batch_size % (seq_len * shards):
        raise UserError(
            f"--total-batch-size {opts.total_batch_size} is not a multiple of {shards} batch shard(s) x "
            f"{seq_len} tokens; change it or --max-seq-len."
        )
    rows = opts.total_batch_size // seq_len
    per_device = min(opts.device_batch_size, rows // shards)
    if per_device < 1 or rows % (per_device * shards):
        raise UserError(
            f"{rows} rows per step do not divide into micro-batches of --device-batch-size {per_device} x "
            f"{shards} shard(s); choose a --device-batch-size that divides {rows // shards}."
        )
    return rows, rows // (per_device * shards)


def horizon(stage: str, opts, model: GPTConfig, epoch_tokens: int | None, tokens_per_step: int) -> int | None:
    """Number of steps: given, from a FLOP budget, from tokens per parameter (base) or epochs (mid, sft).

    None where only the data can tell (`epoch_tokens` missing).
    """
    if opts.num_iterations > 0:
        return opts.num_iterations
    if opts.target_flops > 0:
        return max(1, round(opts.target_flops / (model.flops_per_token() * tokens_per_step)))
    if stage == "base":
        counted = counted_params(model, RECIPES[opts.optimizer].count_all)
        return max(1, int(opts.target_param_data_ratio * counted // tokens_per_step))
    if epoch_tokens is None:
        return None
    return max(1, -(-opts.num_epochs * epoch_tokens // tokens_per_step))
