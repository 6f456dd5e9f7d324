"""The three training stages: which data, which loss, how long. `prepare` decides everything before any work."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from megacontext_jax import mesh as meshes
from megacontext_jax import runtime
from megacontext_jax.checkpoints.contents import load_tokenizer
from megacontext_jax.checkpoints.restore import load_params, read_meta
from megacontext_jax.checkpoints.runs import find_run, latest_step, run_folder, unused_tag
from megacontext_jax.config import SOURCE_STAGES, Config, fixed_options
from megacontext_jax.context import row_setup
from megacontext_jax.context import setup as context_setup
from megacontext_jax.context.gist_rows import GistRows
from megacontext_jax.context.gistnet import GistConfig
from megacontext_jax.context.head_places import places_of
from megacontext_jax.context.objective import ContextConfig, init_context
from megacontext_jax.data import sources
from megacontext_jax.data.conversations import (
    conversation_stream,
    conversation_val_batches,
    estimate_tokens,
)
from megacontext_jax.data.stream import pretrain_stream, val_batches
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.eval.working_contexts import Detail, Probe, views_of
from megacontext_jax.infer.samples import chat_prompts, document_prompts, draw_samples
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective, Phase, make_objective
from megacontext_jax.runtime import print0
from megacontext_jax.train.loop import Setup
from megacontext_jax.train.optim import make_optimizer
from megacontext_jax.train.plan import batch_layout, horizon, model_of, scaled
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules


def prepare(config: Config, stage: str) -> Setup:
    """Resolve a stage: mesh, model, data, horizon, optimiser. Every mistake of the user's surfaces here."""
    run, opts = config.run, getattr(config, stage)
    tag = run.tag or f"d{config.model.depth}"
    tag = unused_tag(stage, tag) if run.fresh else tag
    folder = run_folder(stage, tag)
    mesh = meshes.make_mesh(run.data_axis, run.fsdp_axis, run.tensor_axis)
    seq_len = config.model.max_seq_len

    source = None if stage == "base" else find_source(stage, run.tag or f"d{config.model.depth}")
    if source is None:
        text = sources.prepare_text(config)
        tokenizer = sources.load_tokenizer(text.tokenizer_dir)
        sources.check_vocabulary(tokenizer, config.tokenizer.vocab_size, text.tokenizer_dir)
        model = replace(model_of(config), vocab_size=tokenizer.vocab_size)
    else:
        source_step = config.eval.step if config.eval.step >= 0 else latest_step(source)
        meta = read_meta(source, source_step)
        config = context_setup.keep_saved(config, meta, source.name)
        tokenizer = load_tokenizer(source, meta)
        trained_as = GPTConfig(**meta["model_config"])
        refuse_other_shape(config, trained_as, source.name)
        model = replace(trained_as, sequence_len=seq_len)
        if meta["step"] < meta["num_iterations"]:
            print0(f"Note: {source.name} is unfinished, at step {meta['step']} of {meta['num_iterations']}.")

    scale = scaled(config, stage)
    rows, accumulation = batch_layout(
        replace(opts, total_batch_size=scale.total_batch_size), seq_len, meshes.batch_shards(mesh)
    )
    eval_rows = opts.device_batch_size * meshes.batch_shards(mesh)
    layout = Layout(tokenizer, rows // jax.process_count(), eval_rows // jax.process_count(), seq_len)
    if source is None:
        data = text_data(config, text, layout)
    else:
        data = chat_data(config, stage, layout)

    model, note = row_setup.pattern(config, model, *((source.name, trained_as) if source else ()))
    if note:
        print0(f"Note: {note}")
    gap = 0 if source is None else meta.get("identity", {}).get("run", {}).get("gist_gap", 0)
    if gap and model.attention == "gist" and not config.model.gist_gap:
        print0(f"Note: {source.name} was trained with --gist-gap {gap}; this stage has none.")
    num_iterations = horizon(stage, opts, model, data.epoch_tokens, rows * seq_len)
    dtype = runtime.compute_dtype(run)
    objective = make_objective(
        model,
        attention_impl=row_setup.dense_implementation(config, model),
        dtype=dtype,
        remat=run.remat,
        mesh=mesh,
    )
    model, objective = settle_windows(config, model, objective, fixed=source is not None)
    source_meta, source_name = ({}, "") if source is None else (meta, source.name)
    source_context = context_setup.saved_context(source_meta)
    parts = context_parts(config, model, source_context, source_name)
    if parts is not None:
        phases = context_setup.phases(
            config.mc, objective, parts, num_iterations, shrink=source_context is None
        )
    elif model.attention == "gist":
        gist = context_setup.saved_gist(source_meta) or row_setup.gist_config(config, model)
        phases = row_setup.phases(config, objective, gist, num_iterations, first_stage=source is None)
    else:
        phases = [Phase(0, objective)]
    speaking = objective if parts is not None else phases[-1].objective
    trained, gists = phases[-1].objective, run.mc or model.attention == "gist"
    if config.mc.mc_freeze_base and not gists:
        raise UserError(
            "--mc-freeze-base trains GistNet alone, and this model has none; add --mc or --attention gist, or leave it out."
        )
    recipe = RECIPES[opts.optimizer]
    schedule = schedules(opts, recipe, num_iterations, first_stage=source is None)
    optimizer = make_optimizer(
        opts,
        model,
        schedule,
        rate_scale=scale.rate_scale,
        weight_decay=scale.weight_decay,
        ns_dtype=dtype,
        constrain=meshes.deal_matrices(mesh),
        context=gists,
        freeze_base=gists and config.mc.mc_freeze_base,
    )
    identity = {
        "model": model.to_dict(),
        stage: fixed_options(opts),
        "data": fixed_options(config.data) | {"files": data.digest},
        "tokenizer": tokenizer.digest,
        "seed": run.seed,
        "source": source and f"{source.name} at step {source_step}",
        "compute_dtype": dtype.name,
        "run": {"mc": run.mc, "gist_gap": config.model.gist_gap},
        "mc": fixed_options(config.mc) if gists else {},
    }
    n = model.num_params()
    facts = {
        "Depth": model.n_layer,
        "Width": model.n_embd,
        "Heads": f"{model.n_head} of {model.head_dim} channels, {model.n_kv_head} for keys and values",
        "Architecture": f"{model.arch}, optimiser {opts.optimizer}",
        "Windows": " ".join(map(str, model.windows())) if set(model.window_pattern) != {"L"} else "none",
        "Vocabulary": model.vocab_size,
        "Number of parameters": n["total"],
        "Number of FLOPs per token": model.flops_per_token(),
        "Calculated number of iterations": num_iterations,
        "Number of training tokens": num_iterations * rows * seq_len,
        "Tokens : Params ratio": num_iterations * rows * seq_len / n["total"],
        "Tokens per step": rows * seq_len,
        "Rows per step": f"{rows} of {seq_len} tokens in {accumulation} micro-batch(es)",
        "Mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "Device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "compute dtype": dtype.name,
        "Attention": f"{objective.attention.name} ({objective.attention.why})",
        **({} if parts is None else context_facts(phases, model)),
        **(row_facts(config, phases) if model.attention == "gist" else {}),
    }
    width = max(map(len, facts))
    print0(f"--- {folder.name} ---")
    for name, value in facts.items():
        shown = (
            f"{value:,}" if isinstance(value, int) else f"{value:.2f}" if isinstance(value, float) else value
        )
        print0(f"{name:<{width}} : {shown}")

    return Setup(
        stage=stage,
        tag=tag,
        folder=folder,
        config=config,
        gpt=model,
        mesh=mesh,
        num_iterations=num_iterations,
        accumulation=accumulation,
        stream=data.stream,
        phases=phases,
        init=trained.init,
        optimizer=optimizer,
        rate=schedule.rate,
        nll_fn=trained.nll,
        tokenizer=tokenizer,
        validation=data.validation,
        identity=identity,
        identity_defaults={
            stage: fixed_options(getattr(Config(), stage)),
            "data": fixed_options(Config().data),
            "model": GPTConfig().to_dict(),
            "run": {"mc": False, "gist_gap": Config().model.gist_gap},
            "mc": fixed_options(Config().mc) if gists else {},
        },
        description={"model_config": model.to_dict(), "tokenizer": tokenizer.digest}
        | ({} if parts is None else {"context_config": context_setup.to_dict(parts)})
        | ({"gist_config": asdict(trained.gist)} if model.attention == "gist" else {}),
        start_params=source
        and partial(
            start_from, source, source_step, context_setup.saved_shapes(meta), trained.init, run.seed
        ),
        probe=None
        if parts is None or config.mc.mc_disable_val
        else Probe(
            views_of(config, trained), data.validation["val/bpb"], mesh, detail=probe_detail(config.mc)
        ),
        sample=partial(draw_samples, speaking, tokenizer, data.prompts) if jax.process_count() == 1 else None,
        facts=facts,
    )


def probe_detail(opts) -> Detail:
    return Detail(
        timers=opts.mc_log_timers,
        report=opts.mc_val_report,
        strip=opts.mc_log_lod_ascii_val,
        scores=opts.mc_log_lens_debug,
        training_strip=opts.mc_log_lod_ascii_train,
    )


def context_parts(
    config: Config, model: GPTConfig, saved: ContextConfig | None, source_name: str
) -> ContextConfig | None:
    """GistNet and LensNet of this stage: those of the run it starts from, or new ones; None without --mc."""
    if not config.run.mc:
        if saved and model.attention != "gist":
            print0(f"Note: {source_name} has GistNet and LensNet; without --mc this stage leaves them out.")
        return None
    parts = saved or context_setup.context_config(config.mc, model)
    for sentence in context_setup.limits(config.mc, parts, model.sequence_len):
        print0(f"Note: {sentence}")
    return parts


def refuse_other_shape(config: Config, model: GPTConfig, name: str):
    """The shape of a model is that of its checkpoint."""
    for key in ("head_dim", "rope_share"):
        asked, has, flag = getattr(config.model, key), getattr(model, key), f"--{key.replace('_', '-')}"
        if f"model.{key}" in config.given and asked != has:
            raise UserError(
                f"{flag} {asked} does not fit {name}, which was trained with {flag} {has}; use that, or leave the flag out."
            )


def start_from(
    source: Path, step: int, saved_shapes: dict, init: Callable, seed: int, template: dict
) -> dict:
    """Parameters of the stage before on the shapes and shardings of `template`.

    What it has and the template lacks is left out. `saved_shapes` are those of its GistNet and LensNet; the ones
    that it lacks begin as `init(key)` makes them.
    """
    parts = ("gistnet", "lensnet")
    wanted = {name: x for name, x in template.items() if name not in parts}
    wanted |= {name: shapes | template.get(name, {}) for name, shapes in saved_shapes.items()}
    params = load_params(source, step, wanted)
    new = [name for name in parts if name in template and name not in params]
    if new:
        names = {"gistnet": "GistNet", "lensnet": "LensNet"}
        print0(f"{source.name} has no {' and '.join(names[name] for name in new)}; they begin here.")
        shardings = {name: jax.tree.map(lambda x: x.sharding, template[name]) for name in new}
        begin = jax.jit(lambda key: {name: init(key)[name] for name in new}, out_shardings=shardings)
        params |= begin(jax.random.key(seed))
    return {
        name: {key: params[name][key] for key in x} if name in parts else params[name]
        for name, x in template.items()
    }


def row_facts(config: Config, phases: list) -> dict:
    """Lines for the start and the report."""
    rows: GistRows = phases[-1].objective
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(rows.init, jax.random.key(0))["gistnet"]))
    keys = rows.cfg.keys_per_token()
    return {
        "Attention": row_setup.describe(rows.cfg),
        "Runs": row_setup.runs(config, rows.base),
        "Keys per token": f"{keys.mean():.0f} on average, {keys.max()} at most, of {rows.cfg.sequence_len}",
        "GistNet": f"{rows.gist.kind}, {rows.gist.block} to 1, {size:,} parameters",
        "Heads read gists": reading(rows.gist),
        "Gists begin": "with the first step"
        if len(phases) == 1
        else f"at step {phases[-1].first_step}, before that everything is seen as tokens "
        f"({phases[0].objective.attention.name})",
        "FLOPs per token with gists": f"{rows.flops_per_token:,.0f}, "
        f"{rows.flops_per_token / rows.cfg.flops_per_token():.2f} times dense",
    }


def reading(gist: GistConfig) -> str:
    """How the key heads read gists, for people."""
    if not gist.read_heads:
        return "alike"
    places = (np.flatnonzero(row) for row in places_of(gist.read_heads, gist.block))
    return "at places " + ", ".join(f"{p[0]} to {p[-1]}" if len(p) > 1 else f"{p[0]}" for p in places)


def context_facts(phases: list, model: GPTConfig) -> dict:
    """Lines for the start and the report."""
    first, last = phases[0].objective, phases[-1].objective
    ctx, mix = last.context, last.mixture
    shapes = jax.eval_shape(partial(init_context, ctx), jax.random.key(0))
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    widths = ", ".join(
        f"{p.objective.width} from step {p.first_step}" for p in phases if p.objective.mixture.variants
    )
    return {
        "Gists": f"{ctx.gist.kind}, {ctx.block} to 1, {ctx.levels} level(s), positions {ctx.positions}",
        "GistNet, LensNet": f"{sizes['gistnet']:,} and {sizes['lensnet']:,} parameters",
        "Working contexts": f"{mix.variants} per row beside the raw one, entries: {widths}",
        "Raw tail": f"{mix.recent} tokens",
        "FLOPs per token with --mc": f"{first.flops_per_token:,.0f} at first, {last.flops_per_token:,.0f} at the end, "
        f"{last.flops_per_token / model.flops_per_token():.2f} times vanilla",
    }


def find_source(stage: str, tag: str) -> Path:
    """The run that a stage starts from."""
    *preferred, last = SOURCE_STAGES[stage]
    for earlier in preferred:
        if latest_step(run_folder(earlier, tag)) is not None:
            return find_run(earlier, tag)
    source = find_run(last, tag)
    if preferred:
        print0(f"There is no {' or '.join(preferred)} run '{tag}'; {stage} starts from {source.name}.")
    return source


def settle_windows(config: Config, model: GPTConfig, objective: Objective, *, fixed: bool):
    """Says what short windows become where no kernel makes them cheaper than full attention.

    A new model whose pattern nobody asked for then takes full attention; an asked for or `fixed` one keeps its mask.
    """
    if objective.attention.windowed or min(model.windows()) >= model.sequence_len:
        return model, objective
    why = f"attention {objective.attention.name} has no windowed kernel"
    if model.attention == "sliding":
        print0(f"Note: {why}: the sliding window is a mask over full attention and saves no time.")
        return model, objective
    if fixed or config.model.window_pattern:
        print0(
            f"Note: {why}: the windows {model.window_pattern} are a mask over full attention and save no time."
        )
        return model, objective
    print0(
        f"Note: {why}: window pattern L takes the place of {model.window_pattern} (--window-pattern insists)."
    )
    model = replace(model, window_pattern="L")
    return model, replace(objective, cfg=model)


class Layout(NamedTuple):
    """How this process reads: rows per step and per evaluation batch, tokens per row."""

    tokenizer: Tokenizer
    rows: int
    eval_rows: int
    seq_len: int


class StageData(NamedTuple):
    """What a stage reads: a stream, held-out batches by metric name, and beginnings for samples."""

    stream: object
    validation: dict
    digest: str
    epoch_tokens: int | None
    prompts: list[list[int]]


def text_data(config: Config, text: sources.TextData, layout: Layout) -> StageData:
    opts, processes = config.base, _this_process()
    stream = pretrain_stream(
        text.train,
        layout.tokenizer,
        layout.rows,
        layout.seq_len,
        packing=config.data.packing,
        num_workers=config.data.workers,
        **processes,
    )
    held_out = {"val/bpb": text.val} | {f"val/{name}_bpb": paths for name, paths in text.held_out.items()}
    validation = {
        name: val_batches(
            paths,
            layout.tokenizer,
            layout.eval_rows,
            layout.seq_len,
            max_tokens=opts.eval_tokens,
            packing=config.data.packing,  # as in training: a row that begins inside a document lacks what it asks for
            **processes,
        )
        for name, paths in held_out.items()
    }
    prompts = document_prompts(text.val, layout.tokenizer)
    return StageData(stream, validation, sources.fingerprint(text.train), None, prompts)


def chat_data(config: Config, stage: str, layout: Layout) -> StageData:
    opts, chat = getattr(config, stage), sources.conversations(config, stage)
    options = _this_process() | {
        "packing": opts.chat_packing,
        "mask": opts.mask_prompts,
    }
    stream = conversation_stream(
        chat.train,
        layout.tokenizer,
        layout.rows,
        layout.seq_len,
        shuffle=not (opts.curriculum or chat.shuffled),
        seed=config.run.seed,
        num_workers=config.data.workers,
        **options,
    )
    val = conversation_val_batches(
        chat.val, layout.tokenizer, layout.eval_rows, layout.seq_len, max_tokens=opts.eval_tokens, **options
    )
    prompts = chat_prompts(chat.val, layout.tokenizer)
    return StageData(stream, {"val/bpb": val}, chat.train.digest, estimate_tokens(stream), prompts)


def _this_process() -> dict:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
