"""Run folders: what they are called, how one is found, and who may write to it.

A run lives in `<artifacts>/megacontext_<stage>_<tag>/`; each finished checkpoint is a sub-folder named by its
step, six digits wide. A symbolic link of the same name under the base directory makes it reachable from
there. No JAX here.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from megacontext_jax import paths
from megacontext_jax.errors import UserError

STAGES = ("base", "mid", "sft", "rl")
_PREFIX = "megacontext_"
_LOCK = "lock"


def run_folder(stage: str, tag: str) -> Path:
    """`<artifacts>/megacontext_<stage>_<tag>`, whether it exists or not."""
    if stage not in STAGES:
        raise UserError(f"There is no stage '{stage}'; the stages are {', '.join(STAGES)}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag):
        raise UserError(f"The tag '{tag}' cannot name a folder; take letters, digits, '.', '_' and '-'.")
    return paths.artifacts_dir() / f"{_PREFIX}{stage}_{tag}"


def unused_tag(stage: str, tag: str) -> str:
    """`tag` if no run of that name exists, else the first free one of `tag-2`, `tag-3`, ..."""
    number, candidate = 1, tag
    while run_folder(stage, candidate).exists():
        number += 1
        candidate = f"{tag}-{number}"
    return candidate


def find_run(stage: str, tag: str | None = None) -> Path:
    """The folder of an existing run of `stage` that holds at least one checkpoint.

    Looks in the artifacts directory, then in the base directory. Without a tag: among tags that begin with
    `d<number>` the largest number (of equals the latest saved), otherwise the run saved to last.
    Raises `UserError` that lists what there is.
    """
    run_folder(stage, tag or "d0")  # refuses a bad stage or tag
    places = list(dict.fromkeys([paths.artifacts_dir(), paths.base_dir()]))
    for place in places:
        runs = {t: f for t, f in _runs(place, stage).items() if steps(f)}
        if tag in runs:
            return runs[tag]
        if tag is None and runs:
            return runs[max(runs, key=lambda t: (_depth(t), _saved_at(runs[t])))]
    return _refuse(stage, tag, places)


def saved_arch(stages: Iterable[str], tag: str) -> str | None:
    """The architecture of the first of these runs that exists, None if none does; read without any check."""
    for stage in stages:
        for place in (paths.artifacts_dir(), paths.base_dir()):
            folder = place / f"{_PREFIX}{stage}_{tag}"
            step = latest_step(folder)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                if step is not None:
                    meta = json.loads((step_folder(folder, step) / "meta" / "meta.json").read_text())
                    return str(meta["model_config"]["arch"])
    return None


def steps(folder: Path) -> list[int]:
    """The steps of a run folder in ascending order: everything that bears the name of a step."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and _is_step(p.name))


def latest_step(folder: Path) -> int | None:
    """The largest step of a run folder, or None."""
    return max(steps(folder), default=None)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"{step:06d}"


def link_into_base(folder: Path, say: Callable[[str], None] = print) -> None:
    """Make `<base>/<name of the run>` point at the run; a real file or folder of that name is left alone."""
    link = paths.base_dir() / folder.name
    target = folder.resolve()
    if link.resolve() == target:
        return
    if link.exists() and not link.is_symlink():
        say(f"{link} is a folder of its own and stays; this run is reachable as {folder} only.")
        return
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        partial.symlink_to(target, target_is_directory=True)
        os.replace(partial, link)
    except OSError as error:
        say(f"The link {link} could not be made ({error.strerror}); this run is reachable as {folder} only.")


class FolderLock:
    """One writer per run folder. The kernel drops the lock when the process dies, however it dies.

    A record lock (`lockf`), because forked children do not inherit it: a data worker that outlives a killed
    trainer must not keep the folder. Record locks do not tell two owners in one process apart; `_held` does.
    """

    _held: ClassVar[dict[Path, int]] = {}

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        self._path = folder.resolve() / _LOCK
        if self._path in self._held:
            raise UserError(f"{folder} is already open for writing in this process ({os.getpid()}).")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise UserError(
                f"{folder} is being written to by another run (process {owner}); wait for it, stop it, or "
                "give this run another --tag."
            ) from None
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): make sure that no second run writes to it.")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._held[self._path] = descriptor

    def release(self) -> None:
        descriptor = self._held.pop(self._path, None)
        if descriptor is not None:
            os.close(descriptor)


def _is_step(name: str) -> bool:
    return f"{int(name):06d}" == name


def _runs(place: Path, stage: str) -> dict[str, Path]:
    """tag -> folder of the runs of a stage in one place."""
    start = f"{_PREFIX}{stage}_"
    return {p.name.removeprefix(start): p for p in place.glob(start + "*") if p.is_dir()}


def _depth(tag: str) -> int:
    match = re.match(r"d(\d+)", tag)
    return int(match[1]) if match else -1


def _saved_at(folder: Path) -> float:
    return step_folder(folder, latest_step(folder)).stat().st_mtime


def _refuse(stage: str, tag: str | None, places: list[Path]) -> Path:
    wanted = f"the {stage} run '{tag}'" if tag else f"a {stage} run"
    known = []
    for place in places:
        for other in STAGES:
            for name, folder in sorted(_runs(place, other).items()):
                last = latest_step(folder)
                known.append(f"{other} '{name}' ({'no step yet' if last is None else f'step {last}'})")
    there = "there is " + ", ".join(dict.fromkeys(known)) if known else "there is no run at all"
    where = " and ".join(str(place) for place in places)
    raise UserError(
        f"No checkpoint of {wanted} was found in {where}: {there}; train that stage first, or name another "
        "one with --tag."
    )
