"""What a checkpoint costs: the time a save blocks training, the whole save, verifying, restoring.

    python -m benchmarks.checkpoint [--depth 4] [--repeats 5]

Parameters and AdamW state of a nanochat-shaped model (width 64 x depth, 32,768 words) are filled with random
numbers, saved and restored in a temporary folder. The floor is one file of as many bytes, written to the same
disk and forced out. `restore` includes `verify`. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

from benchmarks.common import machine
from megacontext_jax.checkpoints import digest
from megacontext_jax.checkpoints.runs import step_folder
from megacontext_jax.checkpoints.writer import Checkpoints

VOCABULARY = 32768


def make_state(depth: int) -> tuple:
    width = 64 * depth
    shapes = {"wte": (VOCABULARY, width), "lm_head": (VOCABULARY, width), "c_fc": (depth, 4 * width, width)}
    shapes |= {"mlp_proj": (depth, width, 4 * width)}
    shapes |= dict.fromkeys(("c_q", "c_k", "c_v", "attn_proj"), (depth, width, width))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    opt_state = optax.adamw(1e-3).init(params)

    def fill(x):
        return jax.random.normal(next(keys), x.shape) if x.ndim else x

    return jax.block_until_ready((params, jax.tree.map(fill, opt_state)))


def write_floor(folder: Path, size: int) -> float:
    """Seconds to write `size` random bytes to one file and force them out."""
    block = np.random.default_rng(0).bytes(1 << 22)
    start = time.perf_counter()
    with open(folder / "floor", "wb", buffering=0) as stream:
        for _ in range(max(1, size >> 22)):
            stream.write(block)
        os.fsync(stream.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    params, opt_state = make_state(args.depth)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves((params, opt_state)))
    times: dict[str, list[float]] = {name: [] for name in ("floor", "blocking", "save", "verify", "restore")}
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        os.environ["NANOCHAT_BASE_DIR"] = root
        with Checkpoints(Path(root, "megacontext_base_bench"), keep=1) as checkpoints:
            for step in range(1, args.repeats + 2):
                times["floor"].append(write_floor(Path(root), state_bytes))
                checkpoints.save(step, params=params, opt_state=opt_state, data_state={}, meta={})
                checkpoints.wait()
                times["blocking"].append(checkpoints.stats["blocking_s"])
                times["save"].append(checkpoints.stats["total_s"])
                path = step_folder(checkpoints.folder, step)
                manifest = digest.read_manifest(path)
                start = time.perf_counter()
                digest.verify(path, manifest)
                times["verify"].append(time.perf_counter() - start)
                start = time.perf_counter()
                restored = checkpoints.restore(params_like=params, opt_like=opt_state)
                jax.block_until_ready((restored.params, restored.opt_state))
                times["restore"].append(time.perf_counter() - start)
            size = checkpoints.stats["bytes"]
    median = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    print(
        f"{machine()}; state {state_bytes / 1e6:.0f} MB, on disk {size / 1e6:.0f} MB (medians of {args.repeats})"
    )
    for name, value in median.items():
        print(f"{name:>9}: {1e3 * value:8.1f} ms  {state_bytes / value / 1e9:7.2f} GB/s")
    ms = {f"{name}_ms": round(1e3 * value, 1) for name, value in median.items()}
    print(json.dumps({"benchmark": "checkpoint", "state_mb": round(state_bytes / 1e6), **ms}))


if __name__ == "__main__":
    main()
