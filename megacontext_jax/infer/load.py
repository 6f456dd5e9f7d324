"""A trained model from a checkpoint, ready to evaluate or to talk to."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes
from megacontext_jax import runtime
from megacontext_jax.checkpoints.contents import load_tokenizer
from megacontext_jax.checkpoints.restore import load_params, read_meta
from megacontext_jax.checkpoints.runs import find_run, latest_step
from megacontext_jax.config import Config
from megacontext_jax.context import row_setup
from megacontext_jax.context import setup as context_setup
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.layout import enough_entries
from megacontext_jax.context.objective import ContextObjective
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.infer.chat_model import ChatModel, levels_for, session_rows
from megacontext_jax.infer.context_model import ContextDecoder, context_model
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.focus_programs import FocusConfig
from megacontext_jax.infer.gist_model import gist_model
from megacontext_jax.infer.model import GPTDecoder, Model, gpt_model, prepare_params
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective, abstract_params, make_objective

# what a conversation in working contexts reads beside the weights of decoding
BESIDE = ("gistnet", "lensnet", "wte", "smear_gate", "smear_lambda")


@dataclass(frozen=True)
class LoadedModel:
    """`context` is there with --mc, and the parameters then hold GistNet and LensNet."""

    objective: Objective | GistRows
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int
    context: ContextObjective | None = None

    @property
    def cfg(self) -> GPTConfig:
        return self.objective.cfg

    def __str__(self) -> str:
        return f"{self.folder.name}, step {self.step}"


def load_model(config: Config, *, mesh: Mesh | None = None) -> LoadedModel:
    """The model of `--source`, `--tag` and `--step`, laid out on the mesh (default: the first device)."""
    mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])
    folder = find_run(config.eval.source, config.run.tag or None)
    step = config.eval.step if config.eval.step >= 0 else latest_step(folder)
    meta = read_meta(folder, step)
    tokenizer = load_tokenizer(folder, meta)
    cfg = GPTConfig(**meta["model_config"])
    saved = meta.get("context_config")
    if config.run.mc and not saved:
        raise UserError(
            f"{folder.name} was trained without --mc and has no GistNet; leave --mc out, or go on with mid_train "
            "--mc or chat_sft --mc, which begin one."
        )
    config = context_setup.keep_saved(config, meta, folder.name)
    cfg, note = row_setup.pattern(config, cfg, folder.name)
    if note:
        _tell(f"Note: {note}")
    gist = context_setup.saved_gist(meta)
    if cfg.attention == "gist" and not gist:
        raise UserError(
            f"{folder.name} was trained without gists and has no GistNet; leave --attention gist out, or go on with "
            "mid_train --attention gist or chat_sft --attention gist, which begin one."
        )
    objective = make_objective(
        cfg,
        attention_impl=row_setup.dense_implementation(config, cfg),
        dtype=runtime.compute_dtype(config.run),
        mesh=mesh,
    )
    parts = context_setup.saved_context(meta)
    shapes = abstract_params(cfg) | context_setup.saved_shapes(meta)
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        meshes.param_shardings(mesh, shapes),
    )
    params = load_params(folder, step, template)
    if cfg.attention == "gist":
        rows = _gist_rows(config, objective, gist)
        params = {name: x for name, x in params.items() if name != "lensnet"}
        return LoadedModel(rows, params, tokenizer, folder, step)
    if not config.run.mc:
        base = {name: x for name, x in params.items() if name not in ("gistnet", "lensnet")}
        return LoadedModel(objective, base, tokenizer, folder, step)
    width = context_setup.final_width(config.mc, parts, cfg.sequence_len)
    mixture = context_setup.mixture(config.mc, cfg.sequence_len)
    context = context_setup.objective(config.mc, objective, parts, mixture, width)
    return LoadedModel(objective, params, tokenizer, folder, step, context)


def _gist_rows(config: Config, base: Objective, gist: GistConfig) -> GistRows:
    """The model with gist attention; says what runs it."""
    rows = row_setup.objective(config, base, gist)
    _tell(f"{row_setup.runs(config, base)}; decoding: {rows.decode_implementation}")
    return rows


def _tell(line: str) -> None:
    runtime.print0(line, file=sys.stderr)  # what is asked of a model may be all of the standard output


def decoding_model(params, objective: Objective | GistRows) -> Model:
    """A model ready to generate, from the training pytree."""
    if isinstance(objective, GistRows):
        return gist_model(params, objective)
    return gpt_model(params, objective.cfg, attention=objective.attention.fn, dtype=objective.dtype)


def load_chat(config: Config) -> ChatModel:
    """The model of `--source`, `--tag` and `--step`, ready to hold conversations on one device."""
    return as_chat(config, load_model(config))


def as_chat(config: Config, model: LoadedModel) -> ChatModel:
    """A loaded model, ready to hold conversations."""
    if model.context is not None:
        focus = focus_config(config, model)
        return ChatModel(
            model.tokenizer,
            str(model),
            Model(focus.decoder, prepare_params(model.params, np.dtype(model.objective.dtype))),
            focus,
            {name: x for name, x in model.params.items() if name in BESIDE},
        )
    objective = model.objective
    if isinstance(objective, GistRows):
        objective = session_rows(objective)
    return ChatModel(model.tokenizer, str(model), decoding_model(model.params, objective))


def random_chat(config: Config, model: GPTConfig, tokenizer) -> ChatModel:
    """A model of random weights that holds conversations: with --mc, --attention gist or neither."""
    return as_chat(config, random_model(config, model, tokenizer))


def random_model(config: Config, model: GPTConfig, tokenizer) -> LoadedModel:
    """A model of random weights: with --mc, --attention gist or neither."""
    cfg, _ = row_setup.pattern(config, model)
    base = make_objective(
        cfg,
        attention_impl=row_setup.dense_implementation(config, cfg),
        dtype=runtime.compute_dtype(config.run),
    )
    key = jax.random.key(config.run.seed)
    if config.run.mc:
        parts = context_setup.context_config(config.mc, cfg)
        width = context_setup.final_width(config.mc, parts, cfg.sequence_len)
        mixture = context_setup.mixture(config.mc, cfg.sequence_len)
        context = context_setup.objective(config.mc, base, parts, mixture, width)
        params = jax.jit(context.init)(key)
        return LoadedModel(base, params, tokenizer, Path("random weights"), 0, context)
    if cfg.attention == "gist":
        rows = _gist_rows(config, base, row_setup.gist_config(config, cfg))
        return LoadedModel(rows, jax.jit(rows.init)(key), tokenizer, Path("random weights"), 0)
    return LoadedModel(base, jax.jit(base.init)(key), tokenizer, Path("random weights"), 0)


def focus_config(config: Config, model: LoadedModel) -> FocusConfig:
    """How the working contexts of conversations are kept."""
    opts, context, T = config.mc, model.context, model.cfg.sequence_len
    _check_decodable(model)
    if opts.mc_infer_refocus_interval < 1:
        raise UserError(f"--mc-infer-refocus-interval {opts.mc_infer_refocus_interval} must be at least 1.")
    if not opts.mc_infer_recompute >= 0:
        raise UserError(f"--mc-infer-recompute {opts.mc_infer_recompute} must be at least 0.")
    allocator = replace(
        context_setup.allocator_config(opts, context.context, T),
        max_level=max(context.context.levels, levels_for(context.context.block)),
        edit_cost=opts.mc_infer_edit_cost,
    )
    edits, rebuild = opts.mc_infer_rebuild_max_replacements, opts.mc_infer_rebuild_iterations
    least = enough_entries(block=allocator.block, levels=allocator.max_level, recent=allocator.recent)
    budget = context_setup.budget(opts, context.context, T)
    asked = context_setup.asked_budget(opts)
    if asked and asked < least:
        raise UserError(
            f"A budget of {asked} entries does not hold a conversation of any length: with blocks of {allocator.block} and "
            f"{allocator.recent} recent tokens it takes {least}; raise --mc-eval-soft-max-length or lower "
            "--allocator-recent-tokens."
        )
    budget = max(budget, least)
    # a context that overflows is cut back far enough for the two refocuses after it
    allocator = replace(allocator, slack=min(2 * opts.mc_infer_refocus_interval, budget - least))
    iterations = context_setup.iterations(opts)
    return FocusConfig(
        GPTDecoder(model.cfg, model.objective.attention.fn, np.dtype(model.objective.dtype)),
        context,
        allocator,
        budget,
        opts.mc_lens,
        opts.mc_infer_refocus_interval,
        max(1, iterations),
        rebuild if rebuild >= 0 else allocator.max_level + 2,
        edits if edits >= 0 else allocator.max_replacements,
        opts.mc_infer_recompute,
    )


def _check_decodable(model: LoadedModel) -> None:
    if model.context.context.positions == "gaussian_alibi":
        raise UserError(
            f"{model} has --positional-type gaussian_alibi, whose bias decoding from working contexts does not have; "
            "leave --mc out, or train with gaussian, simple or rank."
        )


def load_engine(config: Config) -> tuple[Engine, LoadedModel]:
    """An engine on one device around the model of `--source`, `--tag` and `--step`; with --mc over working contexts."""
    model = load_model(config)
    if model.context is None:
        return Engine(decoding_model(model.params, model.objective), model.tokenizer), model
    _check_decodable(model)
    attention = model.objective.attention.fn
    opts, T = config.mc, model.cfg.sequence_len
    decoder = ContextDecoder(
        GPTDecoder(model.cfg, attention, model.objective.dtype),
        model.context,
        context_setup.allocator_config(opts, model.context.context, T),
        context_setup.budget(opts, model.context.context, T),
        opts.mc_lens,
        context_setup.iterations(opts),
    )
    return Engine(context_model(model.params, decoder), model.tokenizer), model
