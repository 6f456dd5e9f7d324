"""Checkpoints of one run: asynchronous, atomic, digest-checked, restorable onto another set of devices.

A step is a folder `<run>/<step, six digits>` with the Orbax items `params`, `opt`, `data`, `meta` and a
manifest `digests.json` (see `digest`). How a step comes to be:

1. Orbax writes it in the background to `<run>/unfinished/<step>` and commits it there.
2. A thread reads every file back, writes the manifest into the folder and forces all of it to the disk.
3. One rename moves the folder to `<run>/<step>`. Old steps leave the same way: renamed away, then deleted.

So whatever bears the name of a step was complete once, and "no manifest" can only mean damage. Writing the
manifest into a step that is visible already (as after the commit of Orbax's own manager) would leave a moment
in which a killed save looks like a step that lost a file, and the reader would have to guess. A killed
process leaves its half-done work under `unfinished/`; the next writer says so and clears it away. Readers
never look there.

The layout is that of `orbax.checkpoint.CheckpointManager` with `step_format_fixed_length=6`, which can read
it. A damaged step is refused by name, never skipped. Digests are taken from the files as written, so they
tell what happened to a checkpoint since then; they cannot tell what went wrong in memory before.
"""

import contextlib
import errno
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from megacontext_jax.checkpoints import digest
from megacontext_jax.checkpoints.processes import agree, gather_json
from megacontext_jax.checkpoints.restore import (
    FORMAT,
    Restored,
    check_compatible,
    describe,
    handler,
    plain,
    read_meta,
    restore,
    silence_orbax,
)
from megacontext_jax.checkpoints.runs import FolderLock, latest_step, link_into_base, step_folder, steps
from megacontext_jax.errors import UserError

_UNFINISHED = "unfinished"
_SPARE_BYTES = 1 << 20  # meta data, manifests and directories of a small checkpoint
_LIBRARIES = ("megacontext-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class Checkpoints:
    """The one writer of a run folder; use as a context manager, in every process of the run alike.

    `keep` is how many of the latest steps stay (None = all); only steps of this very run are ever deleted:
    those saved here, and those of the run that `restore` continued. `say` receives the sentences for people.
    Raises `UserError` when another run writes to the folder or when the folder cannot be written.
    """

    def __init__(self, folder: Path, *, keep: int | None = 2, say: Callable[[str], None] | None = None):
        if keep is not None and keep < 1:
            raise UserError(f"At least one checkpoint has to be kept, not {keep}.")
        self.folder = Path(folder).absolute()
        self.run_id = uuid.uuid4().hex
        self.stats: dict = {}  # of the last finished save: step, bytes, blocking_s, total_s
        self._keep = keep
        self._primary = jax.process_index() == 0
        self._say = (say or _print) if self._primary else (lambda sentence: None)
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self._error: BaseException | None = None
        self._lock: FolderLock | None = None
        silence_orbax()
        self._on_primary(self._take_folder)
        self._orbax = _new_orbax()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # the first error is the one to report
            self._say(f"The save under way failed as well: {second}")

    def steps(self) -> list[int]:
        """Steps in the folder, ascending; not the one still being saved."""
        return steps(self.folder)

    def latest_step(self) -> int | None:
        return latest_step(self.folder)

    def read_meta(self, step: int | None = None) -> dict:
        """See `restore.read_meta`."""
        return read_meta(self.folder, step)

    def check_compatible(self, saved: dict, wanted: dict, defaults: dict | None = None) -> None:
        """See `restore.check_compatible`; the sentence names this folder."""
        check_compatible(saved, wanted, defaults=defaults, where=f"the checkpoint in {self.folder}")

    def restore(self, step: int | None = None, *, params_like, opt_like=None) -> Restored:
        """See `restore.restore`; besides, this writer now continues that run (what `keep` may delete)."""
        self.wait()
        restored = restore(self.folder, step, params_like=params_like, opt_like=opt_like)
        self.run_id = restored.run_id
        return restored

    def save(
        self, step: int, *, params, opt_state, data_state: dict, meta: dict, blocking: bool = False
    ) -> None:
        """Save in the background; returns as soon as the arrays may be donated.

        `data_state` (of this process) and `meta` are JSON-able and copied at once; `opt_state` may be None.
        A save still under way is waited for, and its error raised, before this one starts. `UserError` for a
        step that exists and for a full or unwritable disk; earlier steps are untouched then.
        """
        started = time.perf_counter()
        self.wait()
        meta = plain(meta) | {"format": FORMAT, "step": step, "saved_at": time.time(), "versions": versions()}
        trees = {"params": params} | ({} if opt_state is None else {"opt": opt_state})
        about = {
            "format": FORMAT,
            "step": step,
            "run_id": self.run_id,
            "arrays": {name: describe(tree) for name, tree in trees.items()},
        }
        states = gather_json(plain(data_state))
        need = sum(x.nbytes for x in jax.tree.leaves(trees) if hasattr(x, "nbytes"))
        self._on_primary(lambda: self._make_room(step, need))
        draft = self._draft(step)
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items |= {"data": ocp.args.JsonSave({"states": states}), "meta": ocp.args.JsonSave(meta)}
        error = None
        try:
            self._orbax.save(draft, args=ocp.args.Composite(**items))
        except Exception as failed:
            error = failed
        self._agree_on_save(error, step)
        blocked = time.perf_counter() - started
        self._saving = step
        self._thread = threading.Thread(
            target=self._finish, args=(step, draft, about, started, blocked), name=f"checkpoint-{step}"
        )
        self._thread.start()
        if blocking:
            self.wait()

    def check(self) -> None:
        """Raise the error of a background save that has failed by now, without waiting (one process only)."""
        if jax.process_count() == 1 and self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Block until the save under way is finished on disk; raise its error. Call on all processes."""
        if self._thread is None:
            return
        self._thread.join()
        step, error = self._saving, self._error
        self._thread = self._saving = self._error = None
        self._agree_on_save(error, step)

    def close(self) -> None:
        """Wait for the save under way, then let go of the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            if self._lock is not None:
                self._lock.release()

    def _finish(self, step: int, draft: Path, about: dict, started: float, blocked: float) -> None:
        """The background half of a save, in a thread of its own."""
        try:
            self._orbax.wait_until_finished()
            size = 0
            if self._primary:
                size = digest.seal(draft, about)
                os.rename(draft, step_folder(self.folder, step))
                digest.sync_folder(self.folder)
                self._delete_old()
            total = time.perf_counter() - started
            self.stats = {"step": step, "bytes": size, "blocking_s": blocked, "total_s": total}
        except BaseException as error:
            self._error = error

    def _delete_old(self) -> None:
        if self._keep is None:
            return
        mine = [step for step in self.steps() if self._is_mine(step)]
        for step in mine[: -self._keep]:
            try:
                removed = self.folder / _UNFINISHED / f"removed-{step:06d}"
                os.rename(step_folder(self.folder, step), removed)
                shutil.rmtree(removed)
            except OSError as error:
                self._say(f"The old step {step} of {self.folder} could not be deleted ({error.strerror}).")

    def _is_mine(self, step: int) -> bool:
        try:
            return digest.read_manifest(step_folder(self.folder, step))["about"]["run_id"] == self.run_id
        except digest.Damage:
            return False  # whose it was cannot be told: it stays

    def _take_folder(self) -> None:
        try:
            (self.folder / _UNFINISHED).mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, self._say)
            self._clear_unfinished()
        except OSError as error:
            if self._lock is not None:
                self._lock.release()
            raise UserError(
                f"Checkpoints cannot be written to {self.folder} ({error.strerror}); make it writable, or "
                "set MEGACONTEXT_ARTIFACTS to another place."
            ) from None
        link_into_base(self.folder, self._say)

    def _clear_unfinished(self) -> None:
        leftovers = sorted((self.folder / _UNFINISHED).iterdir())
        killed = sorted({int(m[0]) for path in leftovers if (m := re.match(r"\d+", path.name))})
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if killed:
            last = self.latest_step()
            found = "there is no finished step" if last is None else f"the latest finished step is {last}"
            cut = ", ".join(map(str, killed))
            self._say(f"The save of step {cut} in {self.folder} was interrupted and is dropped; {found}.")

    def _make_room(self, step: int, need: int) -> None:
        """Refuse what cannot work before anything is written."""
        target = step_folder(self.folder, step)
        if target.exists() or target.is_symlink():
            raise UserError(
                f"{target} exists and is not overwritten; resume from that step, move the folder away, or "
                "start another run with --fresh or --tag."
            )
        try:
            for path in self._drafts(step):  # of a save that failed in this process
                shutil.rmtree(path)
            free = _free_bytes(self.folder)
        except OSError as error:
            raise self._explain(error, step) from None
        if free < need + _SPARE_BYTES:
            raise UserError(
                f"The checkpoint of step {step} needs {_megabytes(need)} and {self.folder} has "
                f"{_megabytes(free)} left; free some space or set MEGACONTEXT_ARTIFACTS to another disk, "
                f"then run the same command again ({self._intact()})."
            )

    def _agree_on_save(self, error: BaseException | None, step: int) -> None:
        """Raise on every process if the save of `step` failed on any."""
        try:
            agree(None if error is None else self._explain(error, step))
        except BaseException:
            old, self._orbax = self._orbax, _new_orbax()  # the old one would repeat some errors for ever
            with contextlib.suppress(Exception):
                old.close()
            raise

    def _explain(self, error: BaseException, step: int) -> BaseException:
        """A `UserError` for trouble with the disk, else the error itself; what was written is taken back."""
        self._drop(step)
        reason = _disk_reason(error)
        if reason is None or isinstance(error, UserError):
            return error
        return UserError(
            f"The checkpoint of step {step} could not be written to {self.folder} ({reason}); free some "
            f"space or make the folder writable, then run the same command again ({self._intact()})."
        )

    def _drop(self, step: int) -> None:
        """Delete what a failed save wrote; other items of it may be writing still, so look more than once."""
        for _ in range(20 if self._primary else 0):
            drafts = self._drafts(step)
            if not drafts:
                break
            for path in drafts:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.05)

    def _intact(self) -> str:
        last = self.latest_step()
        return "no earlier step exists" if last is None else f"the last step saved is {last}"

    def _draft(self, step: int) -> Path:
        return self.folder / _UNFINISHED / f"{step:06d}"

    def _drafts(self, step: int) -> list[Path]:
        """What a save of `step` has left, including Orbax's own temporary folder."""
        return list((self.folder / _UNFINISHED).glob(f"{step:06d}*"))

    def _on_primary(self, work: Callable[[], None]) -> None:
        """Run file-system work on process 0; every process raises if it fails."""
        error = None
        if self._primary:
            try:
                work()
            except Exception as failed:
                error = failed
        agree(error)


def _new_orbax() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(handler(), timeout_secs=3600)


def versions() -> dict[str, str]:
    """Versions of the libraries that wrote a checkpoint."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _disk_reason(error: BaseException) -> str | None:
    """What the file system said, if that is what an error is about. TensorStore tells in its message only."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRORS:
            return os.strerror(seen.errno)
        for number in _DISK_ERRORS:
            if f"os_error_code='{number}'" in str(seen) or os.strerror(number) in str(seen):
                return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _print(sentence: str) -> None:
    print(sentence, flush=True)
