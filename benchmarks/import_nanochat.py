"""Importing a checkpoint of PyTorch nanochat of depth 20, beside what the disk alone needs.

    python -m benchmarks.import_nanochat [--folder DIR]

A model file of 561 M random float32 parameters is written to DIR (default: a temporary folder) and read with a cold
page cache (as root; otherwise warm, and said so): the file alone, the file into our parameters with every checksum
tested, and `scripts.import_nanochat` in a process of its own, which also writes the checkpoint and forces it to the
disk. Floors: reading the bytes; writing and forcing as many. The last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from megacontext_jax.data import tokenizer_files
from megacontext_jax.data.tokenizer import SPLIT_PATTERN
from megacontext_jax.interop.folders import find_checkpoints
from megacontext_jax.interop.model_file import read_model, state_dict
from megacontext_jax.interop.torch_file import write_torch_file
from megacontext_jax.model.arch import config_for_depth

CHUNK = 1 << 23


def make(base: Path) -> Path:
    cfg = config_for_depth(20, vocab_size=65536, sequence_len=2048)
    rng = np.random.default_rng(0)

    def draw(shape):
        if isinstance(shape, dict):
            return {name: draw(inner) for name, inner in shape.items()}
        return rng.standard_normal(shape, np.float32)

    shapes = cfg.param_shapes()
    folder = base / "base_checkpoints" / "d20"
    path = folder / "model_021400.pt"
    write_torch_file(path, state_dict(cfg, {name: draw(shape) for name, shape in shapes.items()}))
    keys = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    meta = {"step": 21400, "val_bpb": None, "model_config": {key: getattr(cfg, key) for key in keys}}
    (folder / "meta_021400.json").write_text(json.dumps(meta))
    merges = [bytes([i]) for i in range(256)] + [b"%06d" % i for i in range(65536 - 256 - 9)]
    specials = tuple((name, len(merges) + i) for i, name in enumerate(tokenizer_files.SPECIAL_TOKENS))
    vocabulary = tokenizer_files.Vocabulary(SPLIT_PATTERN, tuple(merges), specials)
    (base / "tokenizer").mkdir()
    (base / "tokenizer/tokenizer.pkl").write_bytes(tokenizer_files.to_pickle(vocabulary))
    return path


def forget() -> bool:
    """Drop the page cache; whether that was permitted."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_alone(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write_alone(path: Path, size: int) -> None:
    block = os.urandom(CHUNK)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(block[: min(CHUNK, size - start)])
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to write about 7 GB (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        base = Path(name)
        path = make(base)
        size = path.stat().st_size
        cold = forget()
        read_s = seconds(lambda: read_alone(path))
        write_s = seconds(lambda: write_alone(base / "written", size))
        (base / "written").unlink()
        found = find_checkpoints(base)[0]
        forget()
        params_s = seconds(lambda: read_model(found.model, found.meta))
        forget()
        env = os.environ | {
            "MEGACONTEXT_ARTIFACTS": str(base / "artifacts"),
            "NANOCHAT_BASE_DIR": str(base / "ours"),
        }
        import_s = seconds(
            lambda: subprocess.run(
                [sys.executable, "-m", "scripts.import_nanochat", str(base)], env=env, check=True
            )
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {
        "benchmark": "import_nanochat",
        "machine": f"{machine()}, Python {platform.python_version()}",
        "page_cache": "cold" if cold else "warm",
        "file_gb": round(size / 1e9, 3),
        "read_floor_s": round(read_s, 2),
        "write_floor_s": round(write_s, 2),
        "into_parameters_s": round(params_s, 2),
        "into_parameters_vs_read": round(params_s / read_s, 2),
        "import_process_s": round(import_s, 2),
        "import_vs_read_and_write": round(import_s / (read_s + write_s), 2),
        "peak_memory_vs_file": round(peak / size, 2),
    }
    for key, value in result.items():
        print(f"{key:<26} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
