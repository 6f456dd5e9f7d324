"""Trees of gists that grow by appending: create one, open one, refresh one.

    with create_store("disk", folder, block=32, width=768, gistnet=digest, encode=encode, embed=embed) as tree:
        tree.append(ids)
        tree.gists(1, 0, 10)                    # [10, 768], a view

`store_base` says what a store does and what `encode` and `embed` are, `disk_store` what survives what, `disk_rows`
what is in the files.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megacontext_jax.context.disk_store import DiskTree, create_folder, open_folder, refresh_folder
from megacontext_jax.context.store_base import Embed, Encode, RamTree, TreeSpec, TreeStore
from megacontext_jax.errors import UserError

__all__ = [
    "DiskTree",
    "RamTree",
    "TreeSpec",
    "TreeStore",
    "check_place",
    "create_store",
    "open_store",
    "refresh_store",
]


def check_place(tree: str, folder: str, flag: str) -> None:
    """UserError unless --mc-tree ("" where it was not given) agrees with `folder`, the value of `flag`."""
    if tree == "disk" and not folder:
        raise UserError(f"--mc-tree disk keeps conversations in a folder; name it with {flag} FOLDER.")
    if tree == "ram" and folder:
        raise UserError(
            f"--mc-tree ram keeps conversations in memory, {flag} {folder} in a folder; leave one of them out."
        )


def create_store(
    kind: str,
    path: Path | str | None = None,
    *,
    block: int,
    width: int,
    gistnet: str,
    encode: Encode,
    embed: Embed,
    dtype: str = "float32",
    model_name: str = "",
    max_levels: int = 4,
    chunk: int = 4096,
) -> TreeStore:
    """An empty tree in RAM ("ram") or in the folder `path` ("disk").

    `gistnet` is a digest of the network behind `encode`; `dtype` that of the gists (float32, bfloat16, float16);
    `chunk` the entries per checksum. UserError for values that do not fit and for a folder that holds anything.
    """
    spec = TreeSpec(block, width, gistnet, dtype, model_name, max_levels, chunk)
    if kind == "ram":
        if path is not None:
            raise UserError(f"A tree in RAM has no folder; drop {path} or ask for kind 'disk'.")
        return RamTree(spec, encode, embed)
    if kind != "disk":
        raise UserError(f"There is no store of kind {kind!r}; choose 'ram' or 'disk'.")
    if path is None:
        raise UserError("A tree on disk needs a folder; give one as path.")
    return create_folder(Path(path), spec, encode, embed)


def open_store(
    path: Path | str,
    *,
    gistnet: str,
    encode: Encode,
    embed: Embed,
    block: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    verify: bool = False,
    repair: bool = False,
    gists: bool = True,
    say: Callable[[str], None] = print,
) -> DiskTree:
    """The tree in a folder, as it was when its last append returned.

    Checks the end of every file, with `verify` all of them. UserError for damage, for gists of another GistNet
    and for a `block`, `width` or `dtype` other than the one given here. With `repair`, everything is checked and
    what comes before the damage is kept (after a power cut at least what was synced), gists are encoded anew.
    Without `gists` those that are missing wait for `complete`, as with `append`.
    `say` receives what was found and done.
    """
    wanted = {"block": block, "width": width, "dtype": dtype and np.dtype(dtype).name}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    return open_folder(
        Path(path),
        gistnet,
        encode,
        embed,
        wanted=wanted,
        verify=verify,
        repair=repair,
        gists=gists,
        say=say,
    )


def refresh_store(
    path: Path | str,
    *,
    gistnet: str,
    encode: Encode,
    embed: Embed,
    say: Callable[[str], None] = print,
    **changes,
) -> DiskTree:
    """Rebuild all gists of the tree in a folder from its tokens, with another GistNet, and open it.

    `changes` are new values of block, width, dtype, model_name or max_levels; the rest stays. Killed at any moment
    the folder holds the old tree or the new one.
    """
    return refresh_folder(Path(path), gistnet, encode, embed, changes=changes, say=say)
