"""A process that appends to a tree on disk, or refreshes one over and over, until it is killed.

python store_kill.py FOLDER append SEED     prints the length after every append that returned
python store_kill.py FOLDER refresh SEED    prints the GistNet after every refresh that returned
"""

import sys
from pathlib import Path

import numpy as np

from megacontext_jax.context.store import create_store, open_store, refresh_store

SHAPE = {"block": 4, "width": 4, "max_levels": 4, "chunk": 64}
GISTNETS = {
    "mean": lambda blocks_NKD: blocks_NKD.mean(axis=1),
    "max": lambda blocks_NKD: blocks_NKD.max(axis=1),
}


def embed(ids_n) -> np.ndarray:
    """Rows [n, 4] that tell tokens apart."""
    return np.sin(ids_n[:, None].astype(np.float32) * np.float32([1, 0.1, 0.01, 0.001]))


def stream(start: int, stop: int) -> np.ndarray:
    """The tokens at these places of the history."""
    return ((np.arange(start, stop, dtype=np.uint64) * 2654435761 >> 7) % 50304).astype(np.uint32)


def functions(gistnet: str) -> dict:
    return {"gistnet": gistnet, "encode": GISTNETS[gistnet], "embed": embed}


def append(folder: Path, rng: np.random.Generator) -> None:
    if folder.exists():
        tree = open_store(folder, **functions("mean"), say=lambda sentence: None)
    else:
        tree = create_store("disk", folder, **SHAPE, **functions("mean"))
    print("ready", flush=True)
    while True:
        size = int(rng.choice([1, 7, 64, 1000, 20000], p=[0.3, 0.3, 0.2, 0.15, 0.05]))
        tree.append(stream(len(tree), len(tree) + size), sync=rng.random() < 0.02)
        print(len(tree), flush=True)


def refresh(folder: Path, rng: np.random.Generator) -> None:
    print("ready", flush=True)
    gistnet = "max" if rng.random() < 0.5 else "mean"
    while True:
        refresh_store(folder, **functions(gistnet), say=lambda sentence: None).close()
        print(gistnet, flush=True)
        gistnet = "max" if gistnet == "mean" else "mean"


if __name__ == "__main__":
    work = {"append": append, "refresh": refresh}[sys.argv[2]]
    work(Path(sys.argv[1]), np.random.default_rng(int(sys.argv[3])))
