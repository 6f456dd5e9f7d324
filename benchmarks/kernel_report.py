"""Compile the GPU kernels for Hopper on a machine that has no GPU, and hold them to what they must be.

    python -m benchmarks.kernel_report             every kernel at the shapes of the tiers; seconds each
    python -m benchmarks.kernel_report --step      also a whole training step with gist attention, depth 12

Per kernel: registers, spilled bytes, shared memory, matrix (wgmma) and copy (TMA) instructions. A kernel that spills,
lacks either instruction, or asks for more shared memory than a thread block has fails, and so does a program that
holds a buffer of T^2 numbers. The last line is JSON; the exit status is 1 if anything failed.

The compiler comes in wheels that `bash run_tests.sh` puts into .tools/cuda13.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

TARGET = Path(__file__).with_name("hopper.txtpb")
WHEELS = Path(__file__).resolve().parent.parent / ".tools" / "cuda13"
KERNELS = ("gist_forward", "gist_dq", "gist_dkv_tokens", "gist_dkv_above")
SHARED_MEMORY = 227 * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="store_true", help="also compile a training step of depth 12")
    args = parser.parse_args()
    if not (WHEELS / "jax_plugins").is_dir():
        print(f"error: the GPU compiler is not in {WHEELS}; run `bash run_tests.sh` once.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        return report(Path(folder), args.step)


def report(folder: Path, with_step: bool) -> int:
    prepare(folder)
    failures, found = [], {}
    for name, compile_it, largest in problems(with_step):
        started = time.monotonic()
        compiled = compile_it()
        memory = compiled.memory_analysis().temp_size_in_bytes
        print(f"{name}: {time.monotonic() - started:.0f} s, {memory / 2**20:,.0f} MB beside the arguments")
        if memory > largest:
            failures.append(
                f"{name} holds {memory:,} bytes; more than {largest:,} is a buffer of T^2 numbers"
            )
        kernels = described(folder)
        failures += [f"{name} lacks {kernel}" for kernel in KERNELS if kernel not in kernels]
        for kernel, facts in kernels.items():
            print(f"  {kernel:<16}" + ", ".join(f"{what} {value:,}" for what, value in facts.items()))
            failures += [f"{name}, {kernel}: {what}" for what in wrong(facts)]
        found[name] = kernels | {"temporary_bytes": memory}
    for failure in failures:
        print(f"FAILED: {failure}")
    print(json.dumps({"benchmark": "kernel_report", "target": "sm_90a", "failures": failures, **found}))
    return 1 if failures else 0


def wrong(facts: dict) -> list[str]:
    """What keeps a kernel from being one."""
    found = []
    if facts["spilled"]:
        found.append(f"{facts['spilled']} bytes spilled")
    if facts["mma_sync"] or not facts["wgmma"]:
        found.append("matrix products without wgmma")
    if facts["serialized"]:
        found.append("the compiler waits after every wgmma")
    if not facts["tma"]:
        found.append("copies without TMA")
    if not 0 < facts["shared_memory"] <= SHARED_MEMORY:
        found.append(f"{facts['shared_memory']} bytes of shared memory")
    return found


# --- What is compiled ---------------------------------------------------------------------------------------


def problems(with_step: bool):
    """(name, function that compiles, bytes that it may hold)."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec, gist_attention

    def gradients(B, T, H, K, D, packed=False):
        spec = GistSpec()

        def rows(heads):
            return tuple(jax.ShapeDtypeStruct((B, n, heads, D), jnp.bfloat16) for n in spec.rows(T))

        def run(q, k, v, *segment_ids):
            def attend(q, k, v):
                return gist_attention(
                    q,
                    k,
                    v,
                    spec=spec,
                    segment_ids=segment_ids[0] if packed else None,
                    implementation="mosaic_gpu",
                )

            out, pull = jax.vjp(attend, q, k, v)
            return out, pull(out)

        ids = (jax.ShapeDtypeStruct((B, T), jnp.int32),) if packed else ()
        return lambda: compile_for_hopper(run, rows(H), rows(K), rows(K), *ids)

    # a score of every pair would be 2 bytes per head at the least
    yield "10 heads of 128, 4 x 2,048", gradients(4, 2048, 10, 10, 128), 2 * 4 * 10 * 2048**2
    yield (
        "packed, 12 heads of 64 share 4, 4 x 4,096",
        gradients(4, 4096, 12, 4, 64, True),
        2 * 4 * 12 * 4096**2,
    )
    yield "10 heads of 128, 1 x 32,768", gradients(1, 32_768, 10, 10, 128), 2 * 10 * 32_768**2 // 8
    if with_step:
        yield "training step, depth 12, 4 x 4,096", lambda: training_step(12, 4, 4096), 40 * 2**30


def training_step(depth: int, rows: int, tokens: int):
    """A whole step with gist attention: forward, backward, optimiser."""
    import jax
    import jax.numpy as jnp

    from megacontext_jax import mesh as meshes
    from megacontext_jax.config import Config
    from megacontext_jax.context.gist_rows import GistRows
    from megacontext_jax.context.setup import gist_config
    from megacontext_jax.model.arch import config_for_depth
    from megacontext_jax.model.objective import make_objective
    from megacontext_jax.train.optim import make_optimizer
    from megacontext_jax.train.recipes import RECIPES
    from megacontext_jax.train.schedule import schedules
    from megacontext_jax.train.step import abstract_state, make_train_step

    opts = Config().base
    mesh = meshes.make_mesh(1, 1, 1, devices=hopper().devices.flatten())
    cfg = config_for_depth(depth, sequence_len=tokens, vocab_size=65_536, attention="gist")
    base = make_objective(cfg, attention_impl="reference", dtype="bfloat16", mesh=mesh)
    gist = gist_config(Config().mc, cfg)
    rows_objective = GistRows(base, gist, implementation="mosaic_gpu")
    schedule = schedules(opts, RECIPES[opts.optimizer], 100, first_stage=True)
    optimizer = make_optimizer(opts, cfg, schedule, context=True)
    state = abstract_state(mesh, rows_objective.init, optimizer, jax.random.key(0))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(rows_objective.loss, optimizer, shardings, mesh, seed=0)
    ids = jax.ShapeDtypeStruct((1, rows, tokens), jnp.int32, sharding=meshes.batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, {"inputs": ids, "targets": ids}).compile()


# --- A GPU that is not there --------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Have the kernels of this process described in `folder`; before JAX is imported."""
    sys.path.append(str(WHEELS))
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache was described to somebody else
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def hopper():
    """A mesh of one Hopper GPU."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("data",))


def compile_for_hopper(fn, *shapes):
    import jax

    mesh = hopper()
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*shapes).compile()


def described(folder: Path) -> dict[str, dict]:
    """What the compiler said of the kernels since the last call."""
    found = {}
    for ptx in sorted(folder.glob("*.ptx")):
        code, said = ptx.read_text(), ptx.with_suffix(".ptxas").read_text()
        passes = ptx.with_suffix(".mlir-passes.log").read_text()  # the only place that names dynamic memory
        found[re.sub(r"_?\d*$", "", ptx.stem)] = {
            "registers": _number(r"Used (\d+) registers", said),
            "spilled": _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
            "shared_memory": _number(r"dynamic_shared_memory_size %c(\d+)_i32", passes),
            "wgmma": code.count("wgmma.mma_async"),
            "tma": code.count("cp.async.bulk.tensor"),
            "mma_sync": len(re.findall(r"\bmma\.sync", code)),
            "serialized": said.count("serialized"),
        }
    for file in folder.iterdir():
        file.unlink()
    return found


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    sys.exit(main())
