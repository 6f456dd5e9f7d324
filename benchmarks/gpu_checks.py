"""Cases of the GPU suite that check: the kernels against the float32 reference, decoding, memory and races.

Each yields what it knows before every further step and at its end; "passed" says whether all is well.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module, metadata

from kernels_pallas.shapes import Problem
from kernels_pallas.spec import GistSpec

CLOSE = 1e-2  # relative to the norm: bfloat16 against the float32 reference
DOCUMENT = 1024  # tokens; documents of `packed` have one or more of these
LAYOUTS = ((1, 1, 1, 1), (1, 3))  # of each row of `packed`: its documents, in units of DOCUMENT
PROBLEMS = {
    # from token 2304 on, a window and two spans of level 2, tokens see rows of level 2
    "heads128": Problem(2500, GistSpec(), 2, 4, 2, 128),
    "heads64": Problem(1500, GistSpec(), 2, 4, 2, 64),
    "packed": Problem(4 * DOCUMENT, GistSpec(), len(LAYOUTS), 4, 2, 128),
    "blocks8": Problem(1500, GistSpec(8, 256, 1, 3), 2, 4, 2, 128),
    "blocks128": Problem(
        16_384 + 128 + 2, GistSpec(128, 256, 1, 2), 1, 2, 1, 128
    ),  # with a row of the second level
}
DECODED = Problem(2400, GistSpec(), 2, 4, 2, 128)
SMALL = Problem(300, GistSpec(8, 64, 1, 2), 1, 2, 1, 128)  # under a checker every access costs
OURS = "gist_"  # what the names of all kernels begin with


def check(which: str) -> Iterator[dict]:
    """Relative errors of outputs and gradients against the float32 reference; whether two runs agree in every bit."""
    import jax
    import jax.numpy as jnp

    problem, segment_ids = PROBLEMS[which], documents() if which == "packed" else None
    arrays = problem.arrays(dtype=jnp.bfloat16)
    yield {"under_way": "the kernels"}
    run = jax.jit(push("mosaic_gpu", problem.spec, segment_ids))
    found, again = run(*arrays), run(*arrays)
    alike = all(
        bool((a == b).all()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    )
    yield {"two_runs_alike": alike, "under_way": "the reference"}
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(push("reference", problem.spec, segment_ids))(*in_float32(arrays))
    errors = {
        what: relative_error(ours, theirs)
        for what, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
    }
    passed = alike and all(e < CLOSE for e in errors.values())  # no NaN is below anything
    yield {"two_runs_alike": alike} | errors | {"passed": passed}


def documents():
    """int32 [B, T]: the document of every token of `packed`; rows differ, since kernels have tables for each."""
    import jax.numpy as jnp
    import numpy as np

    rows = [np.repeat(np.arange(len(lengths)), DOCUMENT * np.array(lengths)) for lengths in LAYOUTS]
    return jnp.asarray(np.stack(rows), jnp.int32)


def push(implementation: str, spec: GistSpec, segment_ids=None):
    """f(q, k, v, do) = (outputs, dq, dk, dv)."""
    from benchmarks.gpu_timing import forward_and_backward
    from kernels_pallas import gist_attention

    return forward_and_backward(
        lambda q, k, v: gist_attention(
            q, k, v, spec=spec, segment_ids=segment_ids, implementation=implementation
        )
    )


def in_float32(arrays):
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


def relative_error(ours, theirs) -> float:
    """The largest of all arrays of a tree, each in the Frobenius norm: the few rows of a high level count alone.

    An array without rows has no error. Where all wanted numbers are zero, any other is an infinite error.
    """
    import jax
    import numpy as np

    def of_one(a, b) -> float:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        off, whole = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
        if off == 0:
            return 0.0
        return off / whole if whole else np.inf

    errors = [of_one(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)]
    return float(np.max(errors))  # of numbers with a NaN it is NaN


# --- Decoding -------------------------------------------------------------------------------------------------


def decode_check(problem: Problem = DECODED, prompt: int = 2000) -> Iterator[dict]:
    """Rows decoded one at a time behind a prompt, against whole sequences of the float32 reference."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.decode import fill, init_gist_cache
    from kernels_pallas.reference import gist_attention_reference

    spec, tokens, head_dim = problem.spec, problem.tokens, problem.head_dim
    length_B = jnp.full(problem.batch, prompt, jnp.int32)
    arrays = problem.arrays(dtype=jnp.bfloat16)[:3]
    yield {"under_way": "the reference"}
    with jax.default_matmul_precision("highest"):
        whole = jax.jit(partial(gist_attention_reference, spec=spec, segment_ids=None, scale=head_dim**-0.5))(
            *in_float32(arrays)
        )
    found = {}
    for name, dtype, implementation, close in (
        ("bfloat16", jnp.bfloat16, "xla", CLOSE),
        ("float32", jnp.float32, "xla", 1e-4),
        ("bfloat16, the kernel", jnp.bfloat16, "mosaic_gpu", CLOSE),
    ):
        yield found | {"under_way": name}
        q, k, v = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), arrays)
        cache = init_gist_cache(spec, problem.batch, tokens, problem.key_heads, head_dim, dtype)
        with jax.default_matmul_precision("highest"):
            rows = partial(decoded_rows, spec, count=tokens - prompt, implementation=implementation)
            decoded = jax.jit(rows)(fill(cache, k, v, length_B, spec), (q, k, v), length_B)
        pairs = []
        for level, o_NBHD in enumerate(decoded):
            span = spec.block**level
            first = prompt // span  # the rows that end behind the prompt
            ended = o_NBHD[(first + 1) * span - 1 - prompt :: span].swapaxes(0, 1)
            pairs.append((ended, whole[level][:, first:]))
        ours, theirs = zip(*(p for p in pairs if p[0].size), strict=True)
        found[name] = relative_error(ours, theirs)
        found["passed"] = found.get("passed", True) and found[name] < close
    yield found


def decoded_rows(spec: GistSpec, cache, rows, start_B, count: int, implementation: str = "xla"):
    """Outputs per level [count, B, H, D] of every row that ends at tokens start, start + 1, ...; zeros where none does."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas.decode import append, gist_decode

    q, k, v = rows

    def at(x_BSHD, row_B):
        return jnp.take_along_axis(x_BSHD, row_B[:, None, None, None], axis=1, mode="clip")[:, 0]

    def step(carry, _):
        cache, position_B = carry
        found = []
        for level in range(spec.levels + 1):
            span = spec.block**level
            ends_B = (position_B + 1) % span == 0
            row_B = (position_B + 1) // span - 1
            if q[level].shape[1] == 0:
                continue
            cache = append(cache, level, at(k[level], row_B), at(v[level], row_B), row_B, ends_B)
            o_BHD = gist_decode(
                at(q[level], row_B),
                cache,
                position_B,
                spec=spec,
                level=level,
                implementation=implementation,
            )
            found.append(jnp.where(ends_B[:, None, None], o_BHD, 0.0))
        return (cache, position_B + 1), tuple(found)

    return jax.lax.scan(step, (cache, start_B), None, length=count)[1]


# --- NVIDIA's checkers ----------------------------------------------------------------------------------------


def sanitizer(tool: str) -> Iterator[dict]:
    """One small forward and backward pass under compute-sanitizer's memcheck or racecheck."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), toolkit)))
    if program is None:
        yield {"skipped": "compute-sanitizer is not installed"}
        return
    yield {"under_way": tool}
    # only our kernels: instrumenting those of XLA takes minutes, and a probe of the library is no error
    options = "--kernel-name", f"kns={OURS}", "--report-api-errors", "no", "--error-exitcode", "9"
    done = subprocess.run(
        [program, "--tool", tool, *options, sys.executable, "-m", "benchmarks.gpu_checks"],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",  # arrays of their own, so that leaving one is seen
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer=",
        },
    )
    said = [row.lstrip("= ") for row in done.stdout.splitlines() if row.startswith("=====")]
    ran = "the small problem ran" in done.stdout
    found = {"summary": next((row for row in said if "SUMMARY" in row), "none"), "passed": False}
    if done.returncode == 0 and ran:
        found["passed"] = True
    else:
        found["said"] = said[:12] or done.stderr.strip().splitlines()[-3:]
    yield found


def small_problem() -> None:
    """What runs under the checkers."""
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jax.jit(push("mosaic_gpu", SMALL.spec))(*SMALL.arrays(dtype=jnp.bfloat16)))
    print("the small problem ran")


# --- What it runs on ------------------------------------------------------------------------------------------


def versions() -> Iterator[dict]:
    """Python, JAX, CUDA, cuDNN and the device, as far as they say."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    yield found | {"under_way": "JAX"}
    import jax

    found["device"], found["devices"] = jax.devices()[0].device_kind, len(jax.devices())
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        try:
            asked = import_module(f"{plugin}._versions")
            found["cuda"], found["cudnn"] = asked.cuda_runtime_get_version(), asked.cudnn_get_version()
        except (ImportError, AttributeError, RuntimeError):  # another plugin, an older one, no such library
            continue
        break
    yield found


if __name__ == "__main__":
    small_problem()
