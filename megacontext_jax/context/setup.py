"""From the options of --mc to the parts of a model and the phases of its training."""

from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp

from megacontext_jax.config import Config, MegaContextConfig
from megacontext_jax.context.allocator import AllocatorConfig
from megacontext_jax.context.gistnet import GistConfig, init_gistnet
from megacontext_jax.context.layout import fewest_entries, reachable_width
from megacontext_jax.context.lens_loss import LensLoss
from megacontext_jax.context.lensnet import LensConfig
from megacontext_jax.context.objective import ContextConfig, ContextObjective, Mixture, init_context
from megacontext_jax.context.positions import check_kind
from megacontext_jax.errors import UserError
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective, Phase

WIDTHS = 5  # of the curriculum, each compiled once
FIRST_SHARE = 0.8  # of the row, in the first phase
RECENCY_SHARE = 0.5  # of the variants; the rest is random


def context_config(opts: MegaContextConfig, model: GPTConfig) -> ContextConfig:
    """The MegaContext parts of a new model."""
    if opts.mc_levels < 1:
        raise UserError(f"--mc-levels {opts.mc_levels} must be at least 1.")
    gist = gist_config(opts, model)
    lens = LensConfig(
        _blocks(model, opts.lensnet_layers, "lensnet"),
        block=opts.block_size,
        head=opts.lensnet_head,
        max_level=opts.mc_levels,
    )
    return ContextConfig(gist, lens, opts.mc_levels, check_kind(opts.positional_type))


def gist_config(opts: MegaContextConfig, model: GPTConfig) -> GistConfig:
    """The GistNet of a new model."""
    return GistConfig(
        _blocks(model, opts.gistnet_layers, "gistnet"),
        block=opts.block_size,
        kind=opts.gistnet_type,
        pooling=opts.gistnet_pooling,
        head="none" if opts.gistnet_type == "mean" else opts.gistnet_head,
        forecast=opts.mc_forecast,
    )


def _blocks(model: GPTConfig, layers: int, name: str) -> GPTConfig:
    if layers < 1:
        raise UserError(f"--{name}-layers {layers} must be at least 1.")
    return GPTConfig(
        arch=model.arch,
        n_layer=layers,
        n_embd=model.n_embd,
        n_head=model.n_head,
        n_kv_head=model.n_head,
        vocab_size=64,
    )


def to_dict(ctx: ContextConfig) -> dict:
    """JSON-able; `from_dict` is its inverse."""
    return asdict(ctx)


def from_dict(tree: dict) -> ContextConfig:
    lens = dict(tree["lens"])
    lens["gpt"] = GPTConfig(**lens["gpt"])
    return ContextConfig(gist_from_dict(tree["gist"]), LensConfig(**lens), tree["levels"], tree["positions"])


def gist_from_dict(tree: dict) -> GistConfig:
    return GistConfig(**(tree | {"gpt": GPTConfig(**tree["gpt"])}))


def saved_context(meta: dict) -> ContextConfig | None:
    """GistNet and LensNet of a checkpoint trained with --mc."""
    return from_dict(meta["context_config"]) if meta.get("context_config") else None


def saved_gist(meta: dict) -> GistConfig | None:
    """GistNet of a checkpoint, if it has one."""
    context = saved_context(meta)
    if context:
        return context.gist
    return gist_from_dict(meta["gist_config"]) if meta.get("gist_config") else None


def saved_options(meta: dict, mc: bool) -> dict:
    """The options, by name, that GistNet of a checkpoint was made with, and with `mc` its LensNet."""
    gist, context, found = saved_gist(meta), saved_context(meta) if mc else None, {}
    if gist:
        found = {"block_size": gist.block, "gistnet_type": gist.kind, "mc_forecast": gist.forecast}
        found["gist_heads"] = "places" if gist.read_heads else "alike"
        if gist.kind != "mean":
            layers = {"gistnet_layers": gist.gpt.n_layer}
            found |= layers | {"gistnet_pooling": gist.pooling, "gistnet_head": gist.head}
    if context:
        found |= {"mc_levels": context.levels, "positional_type": context.positions}
        found |= {"lensnet_layers": context.lens.gpt.n_layer, "lensnet_head": context.lens.head}
    return found


def keep_saved(config: Config, meta: dict, name: str) -> Config:
    """The configuration with the options that the parts of the checkpoint `name` were made with.

    What a flag names and the checkpoint contradicts is a UserError. Nothing changes where no gists are wanted.
    """
    attention = config.model.attention or meta["model_config"].get("attention", "dense")
    if not config.run.mc and attention == "dense":
        return config
    saved = saved_options(meta, config.run.mc)
    for key, value in saved.items():
        asked, flag = getattr(config.mc, key), f"--{key.replace('_', '-')}"
        if asked != value and f"mc.{key}" in config.given:
            raise UserError(
                f"{flag} {asked} does not fit {name}, whose gists were trained with {flag} {value}; use that, or "
                "leave the flag out."
            )
    return replace(config, mc=replace(config.mc, **saved))


def saved_shapes(meta: dict) -> dict:
    """Shapes of the parameters that a checkpoint has beside the base model's."""
    context, gist = saved_context(meta), saved_gist(meta)
    if context:
        return jax.eval_shape(partial(init_context, context), jax.random.key(0))
    if gist:
        return {"gistnet": jax.eval_shape(partial(init_gistnet, gist), jax.random.key(0))}
    return {}


def recent_tokens(opts: MegaContextConfig, seq_len: int) -> int:
    if opts.allocator_recent_tokens >= 0:
        return opts.allocator_recent_tokens
    return min(128, seq_len // 8)


def final_width(opts: MegaContextConfig, ctx: ContextConfig, seq_len: int) -> int:
    """Entries of the working context at the end of the curriculum."""
    target = opts.mc_train_wc_length if opts.mc_train_wc_length > 0 else seq_len // 4
    if target > seq_len:
        raise UserError(f"--mc-train-wc-length {target} is longer than a row of {seq_len} tokens.")
    return _reach(target, opts, ctx, seq_len)


def asked_budget(opts: MegaContextConfig) -> int | None:
    """Entries that the flags allow a working context in use: the evaluation's own, or the allocator's; None: derive them."""
    for name in ("mc_eval_soft_max_length", "allocator_soft_max"):
        value = getattr(opts, name)
        if value != -1 and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1, or -1 to derive it.")
        if value != -1:
            return value
    return None


def budget(opts: MegaContextConfig, ctx: ContextConfig, seq_len: int, tokens: int | None = None) -> int:
    """Entries that a working context of `tokens` tokens (None: a row) may have when the model is used."""
    tokens = seq_len if tokens is None else tokens
    shape = {"block": ctx.block, "levels": ctx.levels, "recent": recent_tokens(opts, seq_len)}
    if asked := asked_budget(opts):
        reachable_width(min(asked, tokens), tokens, **shape)  # refuses what no compression reaches
        return asked
    # blocks that a row has and fewer tokens lack may leave these more entries
    return max(final_width(opts, ctx, seq_len), fewest_entries(tokens, **shape))


def _reach(target: int, opts, ctx: ContextConfig, seq_len: int) -> int:
    recent = recent_tokens(opts, seq_len)
    return reachable_width(target, seq_len, block=ctx.block, levels=ctx.levels, recent=recent)


def objective(opts: MegaContextConfig, base: Objective, ctx: ContextConfig, mix: Mixture, width: int):
    dtypes = {"auto": base.dtype, "fp32": jnp.float32, "bf16": jnp.bfloat16}
    return ContextObjective(base, ctx, mix, width, jnp.dtype(dtypes[opts.mc_aux_dtype]))


def phases(
    opts: MegaContextConfig, base: Objective, ctx: ContextConfig, num_iterations: int, *, shrink: bool
) -> list[Phase]:
    """The curriculum: raw rows, then widths from 80 % of the row down to the final one; the last alone unless `shrink`."""
    T = base.cfg.sequence_len
    mix = mixture(opts, T)
    last = final_width(opts, ctx, T)
    if not shrink or not mix.variants:
        return [Phase(0, objective(opts, base, ctx, mix, last))]
    first = max(last, _reach(int(FIRST_SHARE * T), opts, ctx, T))
    widths = dict.fromkeys(
        _reach(round(first + (last - first) * i / (WIDTHS - 1)), opts, ctx, T) for i in range(WIDTHS)
    )
    joined = round(opts.mc_raw_share * num_iterations)
    span = opts.mc_curriculum_share * num_iterations
    found = [Phase(0, objective(opts, base, ctx, replace(mix, variants=0), last))]
    for i, width in enumerate(widths):
        start = joined + round(span * i / max(1, len(widths) - 1))
        if found[-1].first_step == start:
            found.pop()
        found.append(Phase(start, objective(opts, base, ctx, mix, width)))
    return found


def nothing_to_choose(opts: MegaContextConfig, ctx: ContextConfig, seq_len: int) -> bool:
    """Whether all working contexts of the final width are alike, so that no lens can be learned from them."""
    shape = {"block": ctx.block, "levels": ctx.levels, "recent": recent_tokens(opts, seq_len)}
    return final_width(opts, ctx, seq_len) in (seq_len, fewest_entries(seq_len, **shape))


def limits(opts: MegaContextConfig, ctx: ContextConfig, seq_len: int) -> list[str]:
    """Sentences on what training with these options cannot do. UserError where it would train no part of --mc."""
    if opts.mc_num_random_variants == 0:
        raise UserError(
            "--mc-num-random-variants 0 makes no working contexts, so that GistNet and LensNet would never be trained; "
            "use 2 or more, or leave --mc out."
        )
    found = []
    if opts.mc_num_random_variants == 1:
        found.append(
            "--mc-num-random-variants 1 trains no LensNet, which learns from the differences between two working "
            "contexts of a row; use 2 or more for a learned lens."
        )
    elif nothing_to_choose(opts, ctx, seq_len):
        found.append(
            "at the final width of the working contexts there is only one way to lay a row out, so LensNet learns "
            "nothing there; allow more levels, or another --mc-train-wc-length."
        )
    if ctx.positions == "gaussian_alibi":
        found.append(
            "--positional-type gaussian_alibi can be trained and judged (base_loss --mc), but chat_eval, chat_cli and "
            "chat_web refuse such a model with --mc: decoding from working contexts does not have its bias."
        )
    return found


def mixture(opts: MegaContextConfig, seq_len: int) -> Mixture:
    if opts.mc_num_random_variants < 0:
        raise UserError(f"--mc-num-random-variants {opts.mc_num_random_variants} cannot be negative.")
    if not 0 < opts.mc_horizon < seq_len:
        raise UserError(f"--mc-horizon {opts.mc_horizon} must lie between 0 and a row of {seq_len} tokens.")
    if opts.mc_lens_temperature <= 0:
        raise UserError(f"--mc-lens-temperature {opts.mc_lens_temperature} must be positive.")
    if not 0 < opts.mc_lens_hard_negative_ratio <= 1:
        raise UserError(
            f"--mc-lens-hard-negative-ratio {opts.mc_lens_hard_negative_ratio} must lie in (0, 1]."
        )
    if not 0 < opts.mc_lens_budget_smooth_beta < 1:
        raise UserError(f"--mc-lens-budget-smooth-beta {opts.mc_lens_budget_smooth_beta} must lie in (0, 1).")
    for name in ("mc_raw_share", "mc_curriculum_share"):
        if not 0 <= getattr(opts, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(opts, name)} must lie in [0, 1].")
    recent = recent_tokens(opts, seq_len)
    return Mixture(
        variants=opts.mc_num_random_variants,
        recency_share=RECENCY_SHARE,
        recent=recent,
        horizon=opts.mc_horizon,
        ahead=recent // 2,
        lens_weight=opts.mc_lens_loss_weight,
        lens=LensLoss(
            rank_weight=opts.mc_lens_rank_weight,
            budget_weight=opts.mc_lens_budget_weight,
            margin=opts.mc_lens_margin,
            collapse_weight=opts.mc_lens_collapse_weight,
            temperature=opts.mc_lens_temperature,
            kl_weight=opts.mc_lens_kl_weight,
            smooth_weight=opts.mc_lens_budget_smooth_weight,
            smooth_beta=opts.mc_lens_budget_smooth_beta,
            hard_negative_ratio=opts.mc_lens_hard_negative_ratio,
            max_pairs=opts.mc_max_lens_pairs,
        ),
        delta_weight=opts.mc_gist_delta_weight,
        gist_token_weight=opts.mc_gist_token_weight,
        regression_weight=opts.mc_gist_regression_weight,
        freeze_base=opts.mc_freeze_base,
    )


def iterations(opts: MegaContextConfig) -> int:
    """Of a refocus when the model is used; none without a lens."""
    if opts.mc_lens == "none":
        return 0
    asked = opts.mc_infer_allocator_iterations
    return asked if asked >= 0 else opts.allocator_iterations


def allocator_config(opts: MegaContextConfig, ctx: ContextConfig, seq_len: int) -> AllocatorConfig:
    """The allocator as it runs when the model is used."""
    edits = opts.mc_infer_allocator_max_replacements
    return AllocatorConfig(
        block=ctx.block,
        max_level=ctx.levels,
        recent=recent_tokens(opts, seq_len),
        kind=opts.allocator_type,
        expand_threshold=opts.allocator_expand_threshold,
        collapse_threshold=opts.allocator_collapse_threshold,
        max_replacements=edits if edits >= 0 else opts.allocator_max_replacements,
        top_k=opts.allocator_sample_top_k,
        temperature=opts.allocator_sample_temperature,
    )
