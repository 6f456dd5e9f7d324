"""What an append to a tree of gists costs, early and late in a history.

    python -m benchmarks.tree_append [--rounds 31]

Chunks of 64 tokens (block 32, width 64, float32, the mean of a block as `encode`) are
appended around 10,000 and around 1,000,000 tokens of history, in turn, in RAM and on disk. The floor is a bare
write of the bytes that a chunk adds (64 ids, 2 gists of level 1 and their share above) to the end of a file.
The cost per token must not grow: `ratio` is late over early, required <= 1.2. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import machine
from megacontext_jax.context.store import TreeStore, create_store

CHUNK, BLOCK, WIDTH = 64, 32, 64
WINDOW = 64  # appends timed together
EARLY, LATE = 10_000, 1_000_000
CHUNK_BYTES = round(4 * CHUNK + 4 * WIDTH * CHUNK / (BLOCK - 1))


def make(kind: str, path: Path | None, history: int) -> TreeStore:
    table_VD = np.random.default_rng(0).standard_normal((1024, WIDTH), dtype=np.float32)
    tree = create_store(
        kind,
        path,
        block=BLOCK,
        width=WIDTH,
        gistnet="mean",
        encode=lambda blocks_NKD: blocks_NKD.mean(axis=1),
        embed=lambda ids_n: table_VD[ids_n],
    )
    ids = np.random.default_rng(1).integers(0, 1024, history, dtype=np.uint32)
    for start in range(0, history, 1 << 16):
        tree.append(ids[start : start + (1 << 16)])
    return tree


def time_appends(tree: TreeStore, ids: np.ndarray) -> float:
    """Microseconds per token over WINDOW appends."""
    start = time.perf_counter()
    for i in range(WINDOW):
        tree.append(ids[CHUNK * i : CHUNK * (i + 1)])
    return 1e6 * (time.perf_counter() - start) / (WINDOW * CHUNK)


def time_floor(path: Path) -> float:
    data = bytes(CHUNK_BYTES)
    with open(path, "wb", buffering=0) as file:
        start = time.perf_counter()
        for _ in range(WINDOW):
            file.write(data)
        return 1e6 * (time.perf_counter() - start) / (WINDOW * CHUNK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    ids = np.random.default_rng(2).integers(0, 1024, WINDOW * CHUNK, dtype=np.uint32)
    names = [f"{kind}_{history}" for kind in ("ram", "disk") for history in (EARLY, LATE)]
    times: dict[str, list[float]] = {name: [] for name in ["floor", *names]}
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        late = {
            kind: make(kind, Path(root, "late") if kind == "disk" else None, LATE) for kind in ("ram", "disk")
        }
        for turn in range(args.rounds):
            times["floor"].append(time_floor(Path(root, "floor")))
            for kind, tree in late.items():
                path = Path(root, f"early{turn}") if kind == "disk" else None
                with make(kind, path, EARLY) as early:
                    times[f"{kind}_{EARLY}"].append(time_appends(early, ids))
                times[f"{kind}_{LATE}"].append(time_appends(tree, ids))
        tokens = len(late["disk"])
        size = sum(p.stat().st_size for p in late["disk"].folder.iterdir())
        start = time.perf_counter()
        late["disk"].verify()
        verify = time.perf_counter() - start
        for tree in late.values():
            tree.close()
        os.sync()
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{machine()}; chunks of {CHUNK} tokens, block {BLOCK}, width {WIDTH} (medians of {args.rounds})")
    print(f"floor: {CHUNK_BYTES} bytes per chunk written bare, {median['floor']:.3f} µs per token")
    for name in names:
        print(f"{name:>13}: {median[name]:6.3f} µs per token, {median[name] / median['floor']:5.1f} x floor")
    ratio = {kind: median[f"{kind}_{LATE}"] / median[f"{kind}_{EARLY}"] for kind in late}
    print(f"late over early: ram {ratio['ram']:.2f}, disk {ratio['disk']:.2f} (required: at most 1.2)")
    print(f"verify of {tokens:,} tokens ({size / 1e6:.1f} MB): {1e3 * verify:.0f} ms")
    result = {f"{name}_us_per_token": round(value, 4) for name, value in median.items()}
    result |= {f"ratio_{kind}": round(value, 3) for kind, value in ratio.items()}
    print(json.dumps({"benchmark": "tree_append", **result, "verify_ms": round(1e3 * verify, 1)}))


if __name__ == "__main__":
    main()
