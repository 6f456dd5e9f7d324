"""Whole checkpoints between PyTorch nanochat's folders and our runs."""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from megacontext_jax.checkpoints.contents import load_tokenizer, save_tokenizer
from megacontext_jax.checkpoints.restore import load_params, read_meta, restore
from megacontext_jax.checkpoints.runs import run_folder, step_folder, steps
from megacontext_jax.checkpoints.writer import Checkpoints
from megacontext_jax.config import Config, load_arch
from megacontext_jax.data import tokenizer_files
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.errors import UserError
from megacontext_jax.files import write_bytes
from megacontext_jax.interop.folders import STAGE_FOLDERS, Found
from megacontext_jax.interop.model_file import Origin, read_model, state_dict
from megacontext_jax.interop.names import places
from megacontext_jax.interop.optim_file import (
    OptimizerFiles,
    fill_state,
    fresh_groups,
    is_list,
    optimizer_trees,
    rank_files,
    recipe_name,
    state_of,
)
from megacontext_jax.interop.torch_file import StoredTensor, TorchFile, write_torch_file
from megacontext_jax.model.arch import NANOCHAT, GPTConfig
from megacontext_jax.train.optim import make_optimizer
from megacontext_jax.train.plan import scaled
from megacontext_jax.train.recipes import RECIPES
from megacontext_jax.train.schedule import schedules


@dataclass(frozen=True)
class Imported:
    folder: Path
    cfg: GPTConfig
    ranks: int  # files of the optimiser's state; 0: none
    notes: list[str]


def import_checkpoint(
    found: Found,
    *,
    tag: str = "",
    era: str = "",
    softcap: float = 0.0,
    optimizer: bool = True,
    place: bool = True,
) -> Imported:
    """Make a checkpoint of PyTorch nanochat a step of our run `megacontext_<stage>_<tag>`.

    Everything is read and checked before anything is written; a run of another origin or model is refused, and a
    step that is there already is left as it is. `place`: training goes on where nanochat would in its data.
    """
    folder = run_folder(found.stage, tag or found.tag)
    if steps(folder):
        there = read_meta(folder, found.step if found.step in steps(folder) else None)
        if there.get("nanochat", {}).get("meta", {}).get("model_config") != found.meta["model_config"]:
            raise UserError(
                f"{folder} holds another run, which is not overwritten; give this one another name with --as."
            )
        if found.step in steps(folder):
            cfg = GPTConfig(**there["model_config"])
            return Imported(folder, cfg, 0, [f"step {found.step} is there already and stays as it is."])
    tokenizer, flavour = _read_tokenizer(found)
    files = rank_files(found.model) if optimizer else []
    model = read_model(found.model, found.meta, era=era, softcap=softcap)
    if tokenizer.vocab_size != model.cfg.vocab_size:
        raise UserError(
            f"The tokenizer in {found.tokenizer} has {tokenizer.vocab_size} tokens and {found.model} is a model of "
            f"{model.cfg.vocab_size}; name the tokenizer it was trained with by --tokenizer."
        )
    opt_state, groups = None, None
    if files:
        with OptimizerFiles(files, model.cfg, model.origin) as state:
            opt_state = fill_state(_optimizer_like(model.cfg, found.stage), model.cfg, state, found.step)
            groups = state.groups
    identity = {"model": model.cfg.to_dict(), "tokenizer": tokenizer.digest}
    meta = {
        "stage": found.stage,
        "tag": tag or found.tag,
        "num_iterations": found.step,
        "identity": identity,
        "partial_identity": True,  # what else a run must share, nanochat's files do not say
        "config": _config(model.cfg).to_dict(),
        "loop_state": {},
        "model_config": model.cfg.to_dict(),
        "tokenizer": tokenizer.digest,
        "nanochat": {
            "meta": found.meta,
            "origin": model.origin.to_dict(),
            "token_bytes": flavour,
            "optimizer_groups": groups,
        },
    }
    with _uncopied_arrays(), Checkpoints(folder, keep=None) as checkpoints:
        save_tokenizer(tokenizer, folder)
        checkpoints.save(
            found.step,
            params=model.params,
            opt_state=opt_state,
            data_state={"place": _place(found.meta if place else {})},
            meta=meta,
            blocking=True,
        )
    return Imported(folder, model.cfg, len(files), model.notes)


def _place(meta: dict) -> dict:
    """Where nanochat would continue in its data: the row group after the one it read last."""
    state = meta.get("dataloader_state_dict")
    numbers = (
        [state.get(key, default) for key, default in (("pq_idx", 0), ("rg_idx", -1), ("epoch", 1))]
        if isinstance(state, dict)
        else []
    )
    if not numbers or any(type(n) is not int for n in numbers):
        return {"file": 0, "row_group": 0, "epoch": 1}
    return {"file": numbers[0], "row_group": numbers[1] + 1, "epoch": numbers[2]}


@contextmanager
def _uncopied_arrays():
    """Orbax copies numpy arrays lest the caller change them before they are written; here nobody does."""
    handlers = ocp.type_handlers
    usual = handlers.get_type_handler(np.ndarray)
    plain = handlers.NumpyHandler(deepcopy_host_arrays=False)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the replacement is announced as a warning
    handlers.register_type_handler(np.ndarray, plain, override=True)
    try:
        yield
    finally:
        handlers.register_type_handler(np.ndarray, usual, override=True)


def _config(cfg: GPTConfig) -> Config:
    """The configuration that trains this architecture as nanochat did."""
    config = load_arch(Config(), cfg.arch)
    model = replace(
        config.model,
        arch=cfg.arch,
        depth=cfg.n_layer,
        max_seq_len=cfg.sequence_len,
        n_kv_head=cfg.n_kv_head,
        head_dim=cfg.head_dim,
        aspect_ratio=-(-cfg.n_embd // cfg.n_layer),
        window_pattern=cfg.window_pattern,
        softcap=cfg.softcap,
    )
    return replace(config, model=model, tokenizer=replace(config.tokenizer, vocab_size=cfg.vocab_size))


def _optimizer_like(cfg: GPTConfig, stage: str, config: Config | None = None):
    """Shapes of the optimiser state of a stage."""
    opts = getattr(config or _config(cfg), "sft" if stage == "rl" else stage)
    plain = schedules(opts, RECIPES[opts.optimizer], 1, first_stage=True)
    optimizer = make_optimizer(opts, cfg, plain)
    return jax.eval_shape(optimizer.init, _params_like(cfg))


def _read_tokenizer(found: Found) -> tuple[Tokenizer, str]:
    """The tokenizer and how its token_bytes.pt counts: raw bytes, or those of the decoded string (legacy)."""
    if found.tokenizer is None:
        raise UserError(
            f"There is no tokenizer.pkl near {found.model}; name the folder that holds it with --tokenizer."
        )
    tokenizer = Tokenizer(tokenizer_files.from_pickle(found.tokenizer / tokenizer_files.PICKLE_NAME))
    path = found.tokenizer / "token_bytes.pt"
    if not path.exists():
        return tokenizer, "raw"
    with TorchFile(path) as file:
        if not isinstance(file.tree, StoredTensor) or file.tree.shape != (tokenizer.vocab_size,):
            raise UserError(
                f"{path} does not belong to the tokenizer beside it; bring the one that does, or remove it."
            )
        counts = file.tree.read()
    for flavour in ("raw", "legacy"):
        if np.array_equal(counts, tokenizer.token_bytes(legacy=flavour == "legacy")):
            return tokenizer, flavour
    raise UserError(
        f"{path} does not belong to the tokenizer beside it; bring the one that does, or remove it."
    )


@dataclass(frozen=True)
class Exported:
    files: list[Path]
    notes: list[str]


def export_checkpoint(
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    ranks: int = 1,
    optimizer: bool = True,
    bf16_embeddings: bool = False,
) -> Exported:
    """Write a step of our run as PyTorch nanochat's files below the base dir `out`.

    A model file that exists is not overwritten, nor another tokenizer; what a killed export left is.
    """
    meta = read_meta(run, step)
    step, cfg, stage, tag = meta["step"], GPTConfig(**meta["model_config"]), meta["stage"], meta["tag"]
    if cfg.attention != "dense":
        raise UserError(
            f"{run} has {cfg.attention} attention, which PyTorch nanochat cannot express; nothing was written."
        )
    if cfg.constants not in NANOCHAT:
        raise UserError(
            f"{run} is of architecture {cfg.arch}, which PyTorch nanochat cannot express; nothing was written."
        )
    if cfg.rope_share < 1:
        raise UserError(
            f"{run} has channels that do not turn with the position (--rope-share {cfg.rope_share}), which PyTorch nanochat "
            "cannot express; nothing was written."
        )
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1.")
    past = meta.get("nanochat", {})
    rows = cfg.vocab_size if cfg.arch == "classic" else cfg.padded_vocab_size
    half = {name: "bfloat16" for name in places(cfg) if "wte" in name or "value_embeds" in name}
    origin = Origin(**past["origin"]) if past else Origin(half if bf16_embeddings else {}, rows, "")
    folder = out / STAGE_FOLDERS[stage] / tag
    model_file, meta_file = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    if model_file.exists():
        raise UserError(f"{model_file} exists and is not overwritten; give another --out.")
    written = {f"optim_{step:06d}_rank{rank}.pt" for rank in range(ranks)}
    if foreign := sorted({p.name for p in folder.glob(f"optim_{step:06d}*.pt")} - written):
        raise UserError(
            f"{folder / foreign[0]} is in the way and is not overwritten; remove it or give another --out."
        )
    tokenizer = load_tokenizer(run, meta)
    like = _params_like(cfg)
    params, opt_state = _restore(run, step, cfg, meta, like, optimizer)
    state_trees = []
    if opt_state is not None:
        groups = past.get("optimizer_groups") or _groups(cfg, stage, meta)
        state_trees = optimizer_trees(state_of(opt_state, cfg, origin, groups), cfg, ranks)
    files = _write_tokenizer(tokenizer, out / "tokenizer", past.get("token_bytes", "raw"))
    for rank, tree in enumerate(state_trees):
        files.append(folder / f"optim_{step:06d}_rank{rank}.pt")
        write_torch_file(files[-1], tree)
    write_bytes(meta_file, json.dumps(_nanochat_meta(cfg, meta), indent=2).encode())
    write_torch_file(
        model_file, state_dict(cfg, params, origin)
    )  # last: its presence means that all is there
    files += [meta_file, model_file]
    notes = []
    if optimizer and opt_state is None:
        notes.append("The step holds no optimiser state, so none was written.")
    if not past and not bf16_embeddings and cfg.arch not in ("classic",):
        notes.append(
            "Embeddings are in float32; nanochat keeps them in bfloat16 on a GPU (--bf16-embeddings)."
        )
    if cfg.softcap or cfg.arch == "era3b":
        notes.append(
            f"nanochat's files have no place for the soft cap {cfg.logit_cap:g}: its gpt.py must have it."
        )
    return Exported(files, notes)


def _params_like(cfg: GPTConfig):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        cfg.param_shapes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _restore(run: Path, step: int, cfg: GPTConfig, meta: dict, like, optimizer: bool):
    """Parameters, and the optimiser state where the step has one and it is wanted."""
    if not optimizer or not (step_folder(run, step) / "opt").exists():
        return load_params(run, step, like), None
    config = _saved_config(meta)
    restored = restore(run, step, params_like=like, opt_like=_optimizer_like(cfg, meta["stage"], config))
    return restored.params, restored.opt_state


def _saved_config(meta: dict) -> Config:
    """The configuration a run was saved with; sections and options that are unknown by now are left out."""
    config = Config()
    for section, values in meta["config"].items():
        if hasattr(config, section):
            part = getattr(config, section)
            known = {key: value for key, value in values.items() if hasattr(part, key)}
            config = replace(config, **{section: replace(part, **known)})
    return config


def _groups(cfg: GPTConfig, stage: str, meta: dict) -> list:
    config = _saved_config(meta)
    opts = getattr(config, stage)
    if opts.optimizer != recipe_name(cfg):
        raise UserError(
            f"The run was trained with --optimizer {opts.optimizer}, which nanochat of era {cfg.arch} does not have; "
            "export without its state (--no-optimizer)."
        )
    scale = scaled(config, stage)
    return fresh_groups(cfg, opts, scale.rate_scale, scale.weight_decay)


def _nanochat_meta(cfg: GPTConfig, meta: dict) -> dict:
    """The meta file: as imported where the run still is that, else what nanochat writes for the stage."""
    past = meta.get("nanochat")
    if past:
        return past["meta"]
    config = {
        key: getattr(cfg, key)
        for key in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    }
    if cfg.arch != "classic":
        config["window_pattern"] = cfg.window_pattern
    state, saved = meta["loop_state"], _saved_config(meta)
    options = getattr(saved, meta["stage"])
    rates = {key: getattr(options, key) for key in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    out = {
        "step": meta["step"],
        "val_bpb": None,  # a step is saved before it is evaluated
        "model_config": config,
        "user_config": {"run": "megacontext-jax", "depth": cfg.n_layer, **rates},
    }
    if meta["stage"] == "base":
        best = state.get("best", float("inf"))
        out |= {
            "device_batch_size": options.device_batch_size,
            "max_seq_len": cfg.sequence_len,
            "total_batch_size": scaled(saved, "base").total_batch_size,
            "dataloader_state_dict": {"pq_idx": 0, "rg_idx": 0} | ({} if is_list(cfg) else {"epoch": 1}),
            "loop_state": {
                "min_val_bpb": best,
                "smooth_train_loss": 0.0,
                "total_training_time": state.get("meter", {}).get("total_seconds", 0.0),
            },
        }
    return out


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, flavour: str) -> list[Path]:
    pickle = folder / tokenizer_files.PICKLE_NAME
    if pickle.exists():
        if tokenizer_files.from_pickle(pickle).digest != tokenizer.digest:
            raise UserError(
                f"{folder} holds another tokenizer, which is not overwritten; give another --out."
            )
    else:
        write_bytes(pickle, tokenizer_files.to_pickle(tokenizer.vocabulary))
    counts = folder / "token_bytes.pt"
    table = tokenizer.token_bytes(legacy=flavour == "legacy")
    if not counts.exists():
        write_torch_file(counts, table)
    else:
        with TorchFile(counts) as file:
            if not isinstance(file.tree, StoredTensor) or not np.array_equal(file.tree.read(), table):
                raise UserError(f"{counts} counts otherwise and is not overwritten; give another --out.")
    return [pickle, counts]
