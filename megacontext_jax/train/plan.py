"""What a recipe will do on its hardware, from the configuration alone: shapes, tokens, memory, FLOPs."""

from dataclasses import dataclass

from megacontext_jax.config import Config
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig, config_for_depth


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
        sequence_len=m.max_seq_len,
        vocab_size=config.tokenizer.vocab_size,
    )


def plan_stage(config: Config, stage: str, devices: int, activation_bytes: int) -> StagePlan:
    opts, cfg = getattr(config, stage), model_of(config)
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
    adam, muon = n["wte"] + n["lm_head"], n["transformer"]
    state_numbers = 2 * adam + (muon if opts.optimizer == "muon" else 2 * muon)
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
        return max(1, int(opts.target_param_data_ratio * model.num_params()["total"] // tokens_per_step))
    if epoch_tokens is None:
        return None
    return max(1, -(-opts.num_epochs * epoch_tokens // tokens_per_step))
