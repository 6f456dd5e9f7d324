"""Shards of training text: where they come from, and the functions to read and write them.

`python -m megacontext_jax.data.shards -n 8` downloads nanochat's pretraining data into the base directory.
Interrupted, the same command goes on where it stopped.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

from megacontext_jax.data.download import check_parquet, download
from megacontext_jax.data.rowgroups import (
    RowGroupSource,
    ShardInfo,
    ShardWriter,
    check_shard,
    check_shards,
    iter_texts,
    list_shards,
    split_shards,
    write_shards,
)
from megacontext_jax.data.textdir import prepare_text_dir
from megacontext_jax.errors import UserError
from megacontext_jax.paths import base_dir

__all__ = [
    "DATASETS",
    "RowGroupSource",
    "ShardInfo",
    "ShardWriter",
    "check_parquet",
    "check_shard",
    "check_shards",
    "dataset_dir",
    "dataset_files",
    "download",
    "download_dataset",
    "iter_texts",
    "list_shards",
    "prepare_text_dir",
    "split_shards",
    "write_shards",
]

URL_VARIABLE = "MEGACONTEXT_DATA_URL"


class Dataset(NamedTuple):
    """One of nanochat's pretraining sets: `count` files `<url>/shard_XXXXX.parquet` of about 100 MB."""

    url: str
    count: int
    folder: str
    fixed_val: bool  # the last file is always fetched, so that validation does not depend on the number


DATASETS = {
    "fineweb_edu": Dataset(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main",
        1823,
        "base_data",
        False,
    ),
    "climbmix": Dataset(
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main",
        6543,
        "base_data_climbmix",
        True,
    ),
}


def dataset_dir(name: str) -> Path:
    """The folder of a data set in the base directory, where PyTorch nanochat keeps it too."""
    return base_dir() / DATASETS[name].folder


def shard_names(name: str, num_shards: int) -> list[str]:
    """File names for `num_shards` (-1: all) of a data set; climbmix counts its fixed validation file extra.

    Raises UserError for a number that makes no sense.
    """
    dataset = DATASETS[name]
    available = dataset.count - dataset.fixed_val
    if num_shards != -1 and not 1 <= num_shards <= available:
        raise UserError(
            f"{name} has {available} shards to choose from, not {num_shards}; -1 takes all of them."
        )
    indices = list(range(available if num_shards == -1 else num_shards))
    if dataset.fixed_val:
        indices.append(dataset.count - 1)
    return [f"shard_{index:05d}.parquet" for index in indices]


def dataset_files(name: str, num_shards: int) -> list[Path]:
    """The files of `num_shards` (-1: all) of a data set, the validation file last, whatever else lies there.

    Raises UserError naming the first one that is missing.
    """
    folder = dataset_dir(name)
    paths = [folder / shard for shard in shard_names(name, num_shards)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} of {len(paths)} shards of {name} are); run python -m "
            "scripts.prepare_data with the same flags to fetch them, or ask for fewer with --num-shards."
        )
    return paths


def download_dataset(
    name: str,
    num_shards: int,
    *,
    workers: int = 4,
    base_url: str | None = None,
    out_dir: str | Path | None = None,
    token: str | None = None,
    attempts: int = 5,
) -> list[Path]:
    """Downloads shards of `fineweb_edu` or `climbmix`; files already complete are kept. Returns the paths.

    `base_url` falls back to MEGACONTEXT_DATA_URL, then to the hub; `token` to HF_TOKEN. Raises UserError.
    """
    base = (base_url or os.environ.get(URL_VARIABLE) or DATASETS[name].url).rstrip("/")
    folder = Path(out_dir) if out_dir else dataset_dir(name)
    files = [(f"{base}/{shard}", folder / shard) for shard in shard_names(name, num_shards)]
    return download(
        files, workers=workers, token=token, check=check_shard, attempts=attempts, label=f"{name} shards"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megacontext_jax.data.shards", description=__doc__.split("\n\n")[1].replace("`", "")
    )
    parser.add_argument("-n", "--num-shards", type=int, required=True, help="how many; -1 = all of them")
    parser.add_argument("-w", "--workers", type=int, default=4, help="files at a time (default 4)")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="fineweb_edu")
    parser.add_argument("--base-url", help=f"folder of the shards (default: ${URL_VARIABLE} or the hub)")
    parser.add_argument("--out", help="where to put them (default: as nanochat, in $NANOCHAT_BASE_DIR)")
    parser.add_argument("--attempts", type=int, default=5, help="failures in a row before giving up")
    args = parser.parse_args(argv)
    for name in ("workers", "attempts"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    paths = download_dataset(
        args.dataset,
        args.num_shards,
        workers=args.workers,
        base_url=args.base_url,
        out_dir=args.out,
        attempts=args.attempts,
    )
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} shards, {size / 1e9:.2f} GB, in {paths[0].parent}")
    if len(paths) == 1:
        print("Training needs one more: the last shard is the validation split.")
    return 0


if __name__ == "__main__":
    from megacontext_jax.cli import run_main

    sys.exit(run_main(main))
