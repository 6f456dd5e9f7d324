"""Compile the GPU kernels for Hopper on a machine that has no GPU, and hold them to what they must be.

    python -m benchmarks.kernel_report             every kernel at the shapes of the tiers; seconds each
    python -m benchmarks.kernel_report --step      also whole training steps with gist attention, run10's among them
    python -m benchmarks.kernel_report --tiers     those of speedrun and run1000 instead; minutes

Per kernel: registers, spilled bytes, shared memory, matrix (wgmma) and copy (TMA) instructions. Each one that is
compiled must not spill, must have both instructions, and must not ask for more shared memory than a thread block has.
Programs must not hold a buffer of T^2 numbers: of two with as many tokens, the one with rows twice as long may
hold no more than half a byte beside per pair of tokens of a row that it has more. A step of one GPU must fit into the
memory that its tier asks for. The last line is JSON; the exit status is 1 if anything failed.

The compiler comes in wheels that `bash run_tests.sh` puts into .tools/cuda13.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).with_name("hopper.txtpb")
WHEELS = Path(__file__).resolve().parent.parent / ".tools" / "cuda13"
KERNELS = ("gist_forward", "gist_dq", "gist_dkv_tokens", "gist_dkv_above")


class Program(NamedTuple):
    name: str
    compile: Callable
    rows: int
    tokens: int  # of a row
    shorter: str | None = None  # the program before it that has as many tokens in rows half as long
    device_memory: int | None = None  # bytes, arguments and all
    kernels: tuple[str, ...] = KERNELS  # that it must have


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="store_true", help="also compile training steps")
    parser.add_argument("--tiers", action="store_true", help="compile the steps of the large tiers")
    args = parser.parse_args()
    if not (WHEELS / "jax_plugins").is_dir():
        print(f"error: the GPU compiler is not in {WHEELS}; run `bash run_tests.sh` once.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        if args.tiers:
            programs = [tier_step("speedrun"), tier_step("run1000")]
        else:
            programs = [*attention_programs(), *decode_programs(), *(step_programs() if args.step else ())]
        return report(Path(folder), programs)


def report(folder: Path, programs: list[Program]) -> int:
    failures, found, held = [], {}, {}
    for program in programs:
        started = time.monotonic()
        compiled = program.compile()
        memory = held[program.name] = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"{program.name}: {time.monotonic() - started:.0f} s, {memory / 2**20:,.0f} MB beside the arguments"
        )
        failures += too_much(program, held, compiled)
        kernels = described(folder)
        failures += [f"{program.name} lacks {kernel}" for kernel in program.kernels if kernel not in kernels]
        for kernel, instances in kernels.items():
            for facts in instances:
                print(f"  {kernel:<16}" + ", ".join(f"{what} {value:,}" for what, value in facts.items()))
                failures += [f"{program.name}, {kernel}: {what}" for what in wrong(facts)]
        found[program.name] = kernels | {"temporary_bytes": memory}
    for failure in failures:
        print(f"FAILED: {failure}")
    print(json.dumps({"benchmark": "kernel_report", "target": "sm_90a", "failures": failures, **found}))
    return 1 if failures else 0


def too_much(program: Program, held: dict[str, int], compiled) -> list[str]:
    """What a program holds that it should not; `held` has the temporary bytes of all programs so far."""
    from megacontext_jax.telemetry import hardware

    found = []
    if program.shorter is not None:
        more = held[program.name] - held[program.shorter]
        allowed = growth_allowed(program.rows, program.tokens)
        if more > allowed:
            found.append(
                f"{program.name} holds {more:,} bytes more than {program.shorter}; more than {allowed:,} is a "
                "buffer of T^2 numbers"
            )
    if program.device_memory is not None:
        needed = hardware.compiled_memory(compiled)
        if needed > program.device_memory:
            found.append(
                f"{program.name} needs {needed:,} bytes and the device has {program.device_memory:,}"
            )
    return found


def growth_allowed(rows: int, tokens: int) -> int:
    """Bytes: half of what a byte for each pair of tokens of a row takes more than in twice the rows half as long."""
    return (rows * tokens**2 - 2 * rows * (tokens // 2) ** 2) // 2


def wrong(facts: dict) -> list[str]:
    """What keeps a kernel from being one."""
    from kernels_pallas.mosaic_gpu.config import SHARED_MEMORY

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


def attention_programs() -> Iterator[Program]:
    """Forward and backward at the shapes of the tiers (classic heads of 128), of all blocks, and of long rows."""
    from kernels_pallas import GistSpec

    long = "10 heads of 128, 2 x 16,384"
    for name, rows, tokens, heads, spec in (
        ("run10: 6 heads of 128, 64 x 2,048", 64, 2048, 6, GistSpec()),
        ("speedrun: 10 heads of 128, 32 x 2,048", 32, 2048, 10, GistSpec()),
        ("run1000: 16 heads of 128, 8 x 2,048", 8, 2048, 16, GistSpec()),
        ("blocks of 8: 6 heads of 128, 4 x 2,048", 4, 2048, 6, GistSpec(8)),
        ("blocks of 128: 6 heads of 128, 1 x 32,768", 1, 32_768, 6, GistSpec(128)),
        (long, 2, 16_384, 10, GistSpec()),
    ):
        yield Program(name, gradients(rows, tokens, heads, heads, 128, spec), rows, tokens)
    name = "10 heads of 128, 1 x 32,768"
    yield Program(name, gradients(1, 32_768, 10, 10, 128, GistSpec()), 1, 32_768, long)
    name = "packed, 12 heads of 64 share 4, 4 x 4,096"
    yield Program(name, gradients(4, 4096, 12, 4, 64, GistSpec(), packed=True), 4, 4096)


def decode_programs() -> Iterator[Program]:
    """A token of each of many sequences over the rings of a session."""
    for name, batch, heads, key_heads, head_dim in (
        ("decode: 64 sequences, 6 heads of 128", 64, 6, 6, 128),
        ("decode: 16 sequences, 32 heads of 64 share 4", 16, 32, 4, 64),
    ):
        compiled = decoding(batch, heads, key_heads, head_dim)
        yield Program(name, compiled, batch, 1, kernels=("gist_decode",))


def decoding(batch: int, heads: int, key_heads: int, head_dim: int):
    """A function that compiles the attention of a decode step."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec, gist_decode, init_gist_cache

    spec = GistSpec(levels=5)
    cache = jax.eval_shape(lambda: init_gist_cache(spec, batch, 2**25, key_heads, head_dim, jnp.bfloat16))
    q = jax.ShapeDtypeStruct((batch, heads, head_dim), jnp.bfloat16)
    position = jax.ShapeDtypeStruct((batch,), jnp.int32)
    run = partial(gist_decode, spec=spec, implementation="mosaic_gpu")
    return lambda: compile_for_hopper(run, q, cache, position)


def gradients(rows: int, tokens: int, heads: int, key_heads: int, head_dim: int, spec, packed: bool = False):
    """A function that compiles the forward and backward pass."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import gist_attention

    def levels(heads):
        return tuple(
            jax.ShapeDtypeStruct((rows, n, heads, head_dim), jnp.bfloat16) for n in spec.rows(tokens)
        )

    def run(q, k, v, segment_ids=None):
        def attend(q, k, v):
            return gist_attention(q, k, v, spec=spec, segment_ids=segment_ids, implementation="mosaic_gpu")

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(out)

    ids = (jax.ShapeDtypeStruct((rows, tokens), jnp.int32),) if packed else ()
    return lambda: compile_for_hopper(run, levels(heads), levels(key_heads), levels(key_heads), *ids)


def step_programs() -> Iterator[Program]:
    """The training step of run10, and two small ones with as many tokens."""
    from megacontext_jax.config import Config

    yield tier_step("run10_h200")
    short = "step of depth 2, 4 x 4,096"
    yield Program(short, lambda: training_step(Config(), 2, 4, 4096), 4, 4096)
    yield Program("step of depth 2, 2 x 8,192", lambda: training_step(Config(), 2, 2, 8192), 2, 8192, short)


def tier_step(tier: str) -> Program:
    """A micro-step of a tier on one of its GPUs; where it is the only one, it must hold everything."""
    from megacontext_jax.config import Config, load_yaml

    config = load_yaml(Config(), tier)
    depth, rows, tokens = config.model.depth, config.base.device_batch_size, config.model.max_seq_len
    memory = config.run.min_device_memory_gb * 10**9 if config.run.min_devices == 1 else None
    name = f"step of {tier}, depth {depth}, {rows} x {tokens:,}"
    return Program(
        name, lambda: training_step(config, depth, rows, tokens), rows, tokens, device_memory=memory
    )


def training_step(config, depth: int, rows: int, tokens: int):
    """A whole step with gist attention: forward, backward, optimiser, with the recomputation of the configuration."""
    import jax
    import jax.numpy as jnp

    from megacontext_jax import mesh as meshes
    from megacontext_jax.context.gist_rows import GistRows
    from megacontext_jax.context.setup import gist_config
    from megacontext_jax.model.arch import config_for_depth
    from megacontext_jax.model.objective import make_objective
    from megacontext_jax.train.optim import make_optimizer
    from megacontext_jax.train.recipes import RECIPES
    from megacontext_jax.train.schedule import schedules
    from megacontext_jax.train.step import abstract_state, make_train_step

    opts = config.base
    mesh = meshes.make_mesh(1, 1, 1, devices=hopper().devices.flatten())
    cfg = config_for_depth(depth, sequence_len=tokens, vocab_size=65_536, attention="gist")
    base = make_objective(
        cfg, attention_impl="reference", dtype="bfloat16", remat=config.run.remat, mesh=mesh
    )
    objective = GistRows(base, gist_config(config.mc, cfg), implementation="mosaic_gpu")
    schedule = schedules(opts, RECIPES[opts.optimizer], 100, first_stage=True)
    optimizer = make_optimizer(opts, cfg, schedule, context=True)
    state = abstract_state(mesh, objective.init, optimizer, jax.random.key(0))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(objective.loss, optimizer, shardings, mesh, seed=0)
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


def described(folder: Path) -> dict[str, list[dict]]:
    """What the compiler said of every kernel since the last call, by its name."""
    found = {}
    for ptx in sorted(folder.glob("*.ptx")):
        code, said = ptx.read_text(), ptx.with_suffix(".ptxas").read_text()
        passes = ptx.with_suffix(".mlir-passes.log").read_text()  # the only place that names dynamic memory
        facts = {
            "registers": _number(r"Used (\d+) registers", said),
            "spilled": _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
            "shared_memory": _number(r"dynamic_shared_memory_size %c(\d+)_i32", passes),
            "wgmma": code.count("wgmma.mma_async"),
            "tma": code.count("cp.async.bulk.tensor"),
            "mma_sync": len(re.findall(r"\bmma\.sync", code)),
            "serialized": said.count("serialized"),
        }
        found.setdefault(re.sub(r"_?\d*$", "", ptx.stem), []).append(facts)  # the compiler numbers them
    for file in folder.iterdir():
        file.unlink()
    return found


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


if __name__ == "__main__":
    sys.exit(main())
