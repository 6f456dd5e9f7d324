"""A trained model from a checkpoint, ready to evaluate or to talk to."""

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from megacontext_jax import mesh as meshes
from megacontext_jax import runtime
from megacontext_jax.checkpoints.contents import load_tokenizer
from megacontext_jax.checkpoints.restore import load_params, read_meta
from megacontext_jax.checkpoints.runs import find_run, latest_step
from megacontext_jax.config import Config
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.infer.engine import Engine
from megacontext_jax.infer.model import gpt_model
from megacontext_jax.model.arch import GPTConfig
from megacontext_jax.model.objective import Objective, abstract_params, make_objective


@dataclass(frozen=True)
class LoadedModel:
    objective: Objective
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int

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
    shapes = abstract_params(cfg)
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        meshes.param_shardings(mesh, shapes),
    )
    params = load_params(folder, step, template)
    objective = make_objective(
        cfg, attention_impl=config.run.attention_impl, dtype=runtime.compute_dtype(config.run)
    )
    return LoadedModel(objective, params, tokenizer, folder, step)


def load_engine(config: Config) -> tuple[Engine, LoadedModel]:
    """An engine on one device around the model of `--source`, `--tag` and `--step`."""
    model = load_model(config)
    attention = model.objective.attention.fn
    decoder = gpt_model(model.params, model.cfg, attention=attention, dtype=model.objective.dtype)
    return Engine(decoder, model.tokenizer), model
