"""Compile for a Hopper GPU on a machine that has none, and read what the compiler says of every kernel.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jaxlib's version on the path and ptxas with libdevice (a
CUDA toolkit, or the nvidia-cuda-nvcc and nvidia-nvvm wheels). `prepare` must run before JAX is imported, so this
belongs into a process of its own: `python -m benchmarks.kernel_report`.
"""

import os
import re
from pathlib import Path

TARGET = Path(__file__).with_name("hopper.txtpb")
DUMP = "MOSAIC_GPU_DUMP_TO"


def prepare(folder: Path) -> None:
    """Have kernels described in `folder` by everything that this process compiles."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        DUMP: str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def mesh(devices: int = 1):
    """A mesh of GPUs that are not there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(devices,), axis_names=("data",))


def compile_for_hopper(fn, *shapes):
    """The compiled program of `fn` over `jax.ShapeDtypeStruct`s; its `memory_analysis()` works."""
    import jax

    gpus = mesh()
    everywhere = jax.sharding.NamedSharding(gpus, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    with jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
        return jax.jit(fn).lower(*shapes).compile()


def kernels(folder: Path) -> dict[str, dict]:
    """Per kernel compiled since the last call: registers, spills in bytes, shared memory in bytes, instructions."""
    found = {}
    for ptx in sorted(folder.glob("*.ptx")):
        name = re.sub(r"_?\d*$", "", ptx.stem)
        code, said = ptx.read_text(), ptx.with_suffix(".ptxas").read_text()
        passes = ptx.with_name(f"{ptx.stem}.mlir-passes.log")
        found[name] = {
            "registers": _number(r"Used (\d+) registers", said),
            "spilled": _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
            "shared_memory": _number(
                r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text() if passes.exists() else ""
            ),
            "wgmma": code.count("wgmma.mma_async"),
            "tma": code.count("cp.async.bulk.tensor"),
            "mma_sync": len(re.findall(r"\bmma\.sync", code)),
        }
    for file in folder.iterdir():
        file.unlink()
    return found


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0
