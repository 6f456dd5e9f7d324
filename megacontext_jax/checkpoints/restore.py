"""Reading checkpoints: verify the files, compare with what is wanted, then let Orbax place the arrays.

The layout of a step is described in `writer`.
"""

import json
import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from megacontext_jax.checkpoints import digest
from megacontext_jax.checkpoints.processes import agree
from megacontext_jax.checkpoints.runs import step_folder, steps
from megacontext_jax.errors import UserError

FORMAT = 1  # raised when an older reader would misread what is written


@dataclass(frozen=True)
class Restored:
    """What `restore` brings back. `opt_state` is None if it was not asked for.

    `data_states` holds the position of the data stream of every process of the run that saved.
    """

    step: int
    params: Any
    opt_state: Any
    data_states: list[dict]
    meta: dict
    run_id: str

    @property
    def data_state(self) -> dict:
        """The position of this process's data stream; `UserError` if another number of processes saved."""
        saved, here = len(self.data_states), jax.process_count()
        if (
            "place" in self.data_states[0]
        ):  # of an imported checkpoint: a place in the corpus, not in a stream
            return self.data_states[0]
        if saved != here:
            raise UserError(
                f"The checkpoint of step {self.step} was saved by {saved} processes and {here} resume it: "
                f"the position of the data stream cannot be carried over; start {saved} processes."
            )
        return self.data_states[jax.process_index()]


def restore(folder: Path, step: int | None = None, *, params_like, opt_like=None) -> Restored:
    """Restore a step (None = the latest) onto the shapes and shardings given.

    `params_like` and `opt_like` are trees of `jax.ShapeDtypeStruct` with shardings, or of arrays; they may
    describe other devices than those that saved. Without `opt_like` the optimiser state is neither read nor
    checked.
    Raises `UserError` for a damaged, foreign or unfitting checkpoint, before anything is placed on a device.
    """
    wanted = {"params": params_like} | ({} if opt_like is None else {"opt": opt_like})
    step, manifest = _open(folder, step, {*wanted, "data", "meta"})
    path = step_folder(folder, step)
    for item, like in wanted.items():
        _require_fit(path, item, manifest["about"]["arrays"], describe(like))
    arrays = _read_arrays(path, {item: jax.tree.map(_target, like) for item, like in wanted.items()})
    return Restored(
        step=step,
        params=arrays["params"],
        opt_state=arrays.get("opt"),
        data_states=_read_json(path, "data")["states"],
        meta=_read_json(path, "meta"),
        run_id=manifest["about"]["run_id"],
    )


def load_params(folder: Path, step: int | None = None, params_like=None, *, sharding=None, dtype=None):
    """The parameters of a step, for inference or for the next stage; nothing else is read or checked.

    `params_like` as in `restore`, except that its dtypes may differ (arrays are converted). Without it the
    tree is rebuilt as nested dicts from what was saved, floating arrays in `dtype` (None = as saved), placed
    on `sharding` (None = the first local device).
    """
    step, manifest = _open(folder, step, {"params"})
    path = step_folder(folder, step)
    saved = manifest["about"]["arrays"]
    if params_like is None:
        structs = {name: _struct(entry, dtype, sharding) for name, entry in saved["params"].items()}
        params_like = _nest(structs)
    else:
        _require_fit(path, "params", saved, describe(params_like), dtypes=False)
    return _read_arrays(path, {"params": jax.tree.map(_target, params_like)})["params"]


def read_meta(folder: Path, step: int | None = None) -> dict:
    """The meta data of a step (None = the latest), digest-checked; arrays are neither read nor checked."""
    step, _ = _open(folder, step, {"meta"})
    return _read_json(step_folder(folder, step), "meta")


def check_compatible(
    saved: dict,
    wanted: dict,
    *,
    defaults: dict | None = None,
    where: str = "the checkpoint",
    remedy: str = "",
) -> None:
    """Raise one `UserError` naming every key of `wanted` (dicts may nest) whose value differs from `saved`.

    A key absent from `saved`, such as a setting that came after the checkpoint, counts as its value in
    `defaults` (nested like `wanted`), where it has one. Values are compared as JSON (a tuple equals a list);
    `saved` may hold more. `where` names the checkpoint in the sentence, `remedy` replaces the advice at its
    end.
    """
    known = _flat(plain(defaults or {})) | _flat(saved)
    differing = [
        f"{key} is {json.dumps(known[key]) if key in known else 'absent'} there and {json.dumps(value)} here"
        for key, value in _flat(plain(wanted)).items()
        if key not in known or known[key] != value
    ]
    if differing:
        remedy = remedy or "give the values saved there, or start another run with --fresh or --tag"
        raise UserError(f"These settings do not fit {where}: {'; '.join(differing)}; {remedy}.")


def describe(tree) -> dict[str, list]:
    """Path in the tree ("h/c_q") -> [shape, dtype name] of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(np.shape(x)), jnp.result_type(x).name]
        for path, x in leaves
    }


def plain(value):
    """`value` as JSON gives it back; numpy scalars, arrays and paths are accepted."""
    return json.loads(json.dumps(value, default=_to_json))


def handler() -> ocp.CompositeCheckpointHandler:
    """How Orbax reads and writes the four items of a step."""
    return ocp.CompositeCheckpointHandler(
        handler_registry=ocp.handlers.create_default_handler_registry(
            params=ocp.StandardCheckpointHandler(),
            opt=ocp.StandardCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(filename="data.json"),
            meta=ocp.JsonCheckpointHandler(filename="meta.json"),
        )
    )


def silence_orbax() -> None:
    """Let a failed save be one sentence: its error reaches the caller, who says it.

    Orbax also logs every failed future with a long traceback, and abandons the other writes of the item, which
    then complain one by one that their event loop is closed.
    """
    logger = logging.getLogger("absl")
    if _not_a_failed_future not in logger.filters:
        logger.addFilter(_not_a_failed_future)
        sys.unraisablehook = partial(_unless_abandoned, sys.unraisablehook)


def _not_a_failed_future(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.exc_info is None


def _unless_abandoned(show, unraisable) -> None:
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


def _open(folder: Path, step: int | None, items: Collection[str]) -> tuple[int, dict]:
    """The step and its manifest, after process 0 has verified the files of `items`."""
    step, manifest, error = step, None, None
    try:
        step = _pick(folder, step)
        manifest = _verified(folder, step, items)
    except UserError as refused:
        error = refused
    agree(error)
    return step, manifest


def _pick(folder: Path, step: int | None) -> int:
    known = steps(folder)
    if not known:
        raise UserError(
            f"{folder} holds no finished checkpoint; train that stage first, or name another --tag."
        )
    if step is None:
        return known[-1]
    if step not in known:
        raise UserError(f"{folder} has no step {step}; its steps are {', '.join(map(str, known))}.")
    return step


def _verified(folder: Path, step: int, items: Collection[str]) -> dict:
    try:
        return _intact(folder, step, items)
    except digest.Damage as damage:
        raise UserError(f"{damage.path} {damage.reason}; {_way_out(folder, step, items)}.") from None


def _way_out(folder: Path, step: int, items: Collection[str]) -> str:
    """What to do about a damaged step. Readers take the latest step there is, so damaged ones have to go."""
    known = steps(folder)
    intact = [s for s in known if s != step and _is_intact(folder, s, items)]
    if step != known[-1] and intact:  # somebody asked for an earlier step by name
        return f"ask for another step ({', '.join(map(str, intact))} can be read)"
    useless = [s for s in known if s not in intact and (not intact or s > intact[-1])]
    removal = "remove or move away " + " and ".join(str(step_folder(folder, s)) for s in useless)
    if not intact:
        return f"{removal}, then the same command starts again: no step of this run can be read"
    return f"{removal}, then the same command goes on from step {intact[-1]}"


def _intact(folder: Path, step: int, items: Collection[str]) -> dict:
    path = step_folder(folder, step)
    manifest = digest.read_manifest(path)
    about = manifest["about"]
    if about["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer version (format {about['format']}, known here: {FORMAT}); "
            "update this one."
        )
    if about["step"] != step:
        raise digest.Damage(path, f"is a copy of step {about['step']} under another name")
    if jax.process_index() == 0:
        digest.verify(path, manifest, items)
    return manifest


def _is_intact(folder: Path, step: int, items: Collection[str]) -> bool:
    try:
        _intact(folder, step, items)
    except (digest.Damage, UserError):
        return False
    return True


def _require_fit(path: Path, item: str, saved: dict, wanted: dict, dtypes: bool = True) -> None:
    if item not in saved:
        raise UserError(f"{path} holds no '{item}'; it serves inference, training cannot go on from it.")
    have = saved[item]
    differing = []
    for name in sorted(have.keys() | wanted.keys()):
        a, b = have.get(name), wanted.get(name)
        if a is None or b is None or a[0] != b[0] or (dtypes and a[1] != b[1]):
            differing.append(f"{item}/{name} is {_show(a)} in the checkpoint and {_show(b)} here")
    if differing:
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise UserError(
            f"{path} does not fit: {'; '.join(differing[:3])}{more}; use the model and optimiser settings it "
            "was saved with, or start another run with --fresh or --tag."
        )


def _show(entry: list | None) -> str:
    return "absent" if entry is None else f"{entry[1]}{entry[0]}"


def _read_arrays(path: Path, targets: dict) -> dict:
    with ocp.Checkpointer(handler()) as checkpointer:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        return dict(checkpointer.restore(path.resolve(), args=ocp.args.Composite(**items)).items())


def _read_json(path: Path, item: str) -> dict:
    return json.loads((path / item / f"{item}.json").read_text())


def _target(x) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or _local()
    return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x), sharding=sharding)


def _struct(entry: list, dtype, sharding) -> jax.ShapeDtypeStruct:
    saved = jnp.dtype(entry[1])
    dtype = dtype if dtype is not None and jnp.issubdtype(saved, jnp.floating) else saved
    return jax.ShapeDtypeStruct(tuple(entry[0]), dtype, sharding=sharding or _local())


def _local() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _nest(flat: dict) -> dict:
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _flat(value: dict, prefix: str = "") -> dict:
    flat = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            flat |= _flat(entry, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = entry
    return flat


def _to_json(value):
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")
