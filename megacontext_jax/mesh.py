"""One mesh from one CPU to many GPUs.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads and hidden
units. Optimiser state is split over data and fsdp together, wherever a dimension divides. The table below is
the whole sharding policy.
"""

import atexit
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from megacontext_jax.errors import UserError

P = PartitionSpec
BATCH = ("data", "fsdp")

# parameter name -> axes of its dimensions (layer axis first where there is one)
PARAM_AXES = {
    "wte": (None, "fsdp"),
    "lm_head": ("tensor", "fsdp"),
    "c_q": (None, "tensor", "fsdp"),
    "c_k": (None, "tensor", "fsdp"),
    "c_v": (None, "tensor", "fsdp"),
    "attn_proj": (None, "fsdp", "tensor"),
    "c_fc": (None, "tensor", "fsdp"),
    "mlp_proj": (None, "fsdp", "tensor"),
    "value_embeds": (None, "tensor", "fsdp"),
}


def start_distributed(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Join a multi-process run: under SLURM with several tasks by itself, elsewhere by the flags."""
    if coordinator:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator {coordinator} needs --num-processes N and --process-id 0..N-1, "
                f"not {num_processes} and {process_id}."
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    else:
        return
    atexit.register(jax.distributed.shutdown)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes the rest."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"--data-axis, --fsdp-axis and --tensor-axis are positive, at most one is -1; got {sizes}."
        )
    if (free and devices.size % fixed) or (not free and fixed != devices.size):
        raise UserError(
            f"{devices.size} devices do not form a mesh of data {data} x fsdp {fsdp} x tensor {tensor}; "
            "change --data-axis, --fsdp-axis or --tensor-axis."
        )
    if free:
        sizes[free[0]] = devices.size // fixed
    if jax.process_count() > 1 and jax.local_device_count() % sizes["tensor"]:
        raise UserError(
            f"--tensor-axis {sizes['tensor']} would span processes of {jax.local_device_count()} devices each, "
            "which then had to read the same rows; choose one that divides them."
        )
    return Mesh(devices.reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def param_shardings(mesh: Mesh, shapes):
    """NamedShardings for a tree of parameter shapes (anything with `.shape`)."""
    return jax.tree.map_with_path(lambda p, x: NamedSharding(mesh, _spec(mesh, p, x.shape, {})), shapes)


def state_shardings(mesh: Mesh, state):
    """Shardings for a whole training state: parameters by the table, their optimiser twins split further."""

    def one(path, x):
        inside_optimizer = getattr(path[0], "name", None) == "opt_state"
        widen = {"fsdp": BATCH} if inside_optimizer else {}
        return NamedSharding(mesh, _spec(mesh, path, x.shape, widen))

    return jax.tree.map_with_path(one, state)


def batch_sharding(mesh: Mesh, ndim: int = 3) -> NamedSharding:
    """[accumulation, rows, tokens]: rows are split."""
    return NamedSharding(mesh, P(*(None,) * (ndim - 2), BATCH, None))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def deal_matrices(mesh: Mesh):
    """Place a stack [K, rows, columns] with whole matrices per device; K is padded by the compiler."""
    if batch_shards(mesh) == 1:
        return lambda stack: stack
    sharding = NamedSharding(mesh, P(BATCH))
    return lambda stack: jax.lax.with_sharding_constraint(stack, sharding)


def global_batch(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """This process's part [accumulation, rows, tokens] of a batch as a global array."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim), rows)


def _spec(mesh: Mesh, path, shape, widen: dict) -> PartitionSpec:
    names = [key.key for key in path if hasattr(key, "key")]
    axes = PARAM_AXES.get(names[-1]) if names else None
    if axes is None or len(axes) != len(shape):
        return P()
    return P(*(_fit(mesh, widen.get(axis, axis), extent) for axis, extent in zip(axes, shape, strict=True)))


def _fit(mesh: Mesh, axis, extent: int):
    """The axis if it splits this extent evenly into more than one part, else the part of it that does."""
    if axis is None:
        return None
    axes = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(a for a in axes if mesh.shape[a] > 1)
    while axes and extent % int(np.prod([mesh.shape[a] for a in axes])):
        axes = axes[:-1]
    return (axes if len(axes) > 1 else axes[0]) if axes else None
