"""A small training run for the kill tests, started many times over.

The run resumes from the latest checkpoint of a folder, checks that it holds exactly what a run without
interruption holds there, and saves every step. `serve` imports the libraries once and forks one run per line
of standard input, a JSON list [FOLDER, N_STEPS, WHERE, STEP]: with WHERE the run kills itself (SIGKILL) at that
moment of STEP. Lines out: "pid N" and "exit STATUS" from the server, "at STEP", "saving STEP", "done" from the
run.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from megacontext_jax.checkpoints import digest, writer

SIZE = 400_000
KEEP = 2
MOMENTS = (
    "while Orbax writes",
    "before the manifest",
    "manifest half written",
    "after the manifest",
    "after the rename",
    "old step renamed",
    "old step half deleted",
)


def state_at(step: int) -> tuple[dict, dict]:
    """What the run holds after `step` steps: a function of the step alone."""
    rng = np.random.default_rng(step)
    params = {"w": rng.standard_normal(SIZE, dtype=np.float32), "h": {"b": np.full(3, step, np.float32)}}
    opt = {"mu": rng.standard_normal(SIZE, dtype=np.float32), "count": np.int32(step)}
    return jax.tree.map(jax.numpy.asarray, (params, opt))


def check(restored) -> None:
    expected = state_at(restored.step)
    actual = (restored.params, restored.opt_state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), actual, expected)), restored.step
    assert restored.data_state == {"position": restored.step}
    assert restored.meta["step"] == restored.step


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(folder: Path, where: str, step: int) -> None:
    """Make this process kill itself at one moment of the save of `step`."""
    name, oldest = f"{step:06d}", f"removed-{step - KEEP:06d}"
    seal, rename, replace, rmtree = digest.seal, os.rename, os.replace, writer.shutil.rmtree

    def dying_seal(draft, about):
        if where == "before the manifest" and draft.name == name:
            die()
        size = seal(draft, about)
        if where == "after the manifest" and draft.name == name:
            die()
        return size

    def dying_replace(old, new):
        if where == "manifest half written" and Path(new).parent.name == name:
            os.truncate(old, 100)
            die()
        replace(old, new)

    def dying_rename(old, new):
        rename(old, new)
        if where == "after the rename" and Path(new) == folder / name:
            die()
        if where == "old step renamed" and Path(new).name == oldest:
            die()

    def dying_rmtree(path, **options):
        if where == "old step half deleted" and Path(path).name == oldest:
            next(Path(path).rglob("*.ocdbt")).unlink()
            die()
        rmtree(path, **options)

    def watch():
        while not list((folder / "unfinished").glob(f"{name}*/**/d/*")):
            time.sleep(0.0005)
        die()

    assert where in MOMENTS, where
    digest.seal, os.rename, os.replace, writer.shutil.rmtree = (
        dying_seal,
        dying_rename,
        dying_replace,
        dying_rmtree,
    )
    if where == "while Orbax writes":
        threading.Thread(target=watch, daemon=True).start()


def run(folder: str, n_steps: int, where: str = "", at: int = -1) -> None:
    if where:
        arm(Path(folder), where, at)
    with writer.Checkpoints(Path(folder), keep=KEEP) as checkpoints:
        step = 0
        if checkpoints.latest_step() is not None:
            params, opt = state_at(0)
            restored = checkpoints.restore(params_like=params, opt_like=opt)
            check(restored)
            step = restored.step
        print("at", step, flush=True)
        while step < n_steps:
            step += 1
            params, opt = state_at(step)
            data_state = {"position": step}
            checkpoints.save(
                step, params=params, opt_state=opt, data_state=data_state, meta={"stage": "base"}
            )
            print("saving", step, flush=True)
    print("done", flush=True)


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run(*json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        print("pid", pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
