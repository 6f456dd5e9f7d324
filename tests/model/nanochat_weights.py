"""Golden models of PyTorch nanochat, as our parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from megacontext_jax.interop.model_file import read_meta_file, read_model
from megacontext_jax.interop.names import named

CASES = (
    "classic_mha",
    "classic_gqa",
    "era2_jan11_lambdas_window",
    "era3_feb05_ve32_half_window",
    "era3b_mar04_softcap20",
    "era4_mar09_ve12_qk115",
    "head_mha_L",
    "head_gqa_padvocab",
    "head_swa",
)


def golden_model(folder: Path):
    """(cfg, params, arrays) of a golden case or of a nanochat checkpoint folder; arrays may be None."""
    model = next(folder.glob("model_*.pt"))
    meta = read_meta_file(next(folder.glob("meta_*.json")))
    softcap = 20.0 if "softcap20" in folder.name else 0.0
    loaded = read_model(model, meta, softcap=softcap)
    arrays = np.load(folder / "io.npz") if (folder / "io.npz").exists() else None
    return loaded.cfg, jax.tree.map(jnp.asarray, loaded.params), arrays


def by_name(cfg, tree: dict) -> dict[str, np.ndarray]:
    """A tree shaped like the parameters by nanochat's names."""
    return {name: np.asarray(x) for name, x in named(cfg, tree).items()}
