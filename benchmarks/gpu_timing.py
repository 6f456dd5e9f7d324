"""Cases of the GPU suite that time attention. Each yields what it knows before every further step and at its end."""

import statistics
import time
from collections.abc import Iterator

HEADS, HEAD_DIM = 10, 128
LENGTHS = (2048, 4096, 8192, 32_768, 65_536)
RIVALS = ("dense", "sliding", "xla")
BANDWIDTH = {"h100": 3.35e12, "h200": 4.8e12}  # bytes/s, from the data sheets of the SXM boards


def timing(T: int, batch: int) -> Iterator[dict]:
    """Milliseconds of the kernels and of every rival, each guarded: one that fails costs its own figure alone.

    cuDNN comes before the kernels, so that one that hangs does not take it along; XLA, which takes longest, comes last.
    """
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec, gist_attention
    from kernels_pallas.shapes import Problem

    spec = GistSpec()
    problem = Problem(T, spec, batch, HEADS, HEADS, HEAD_DIM)
    found = bounds(problem)
    yield found
    # of a program that does nothing: figures near it are those of the host
    found["launch_ms"] = milliseconds(jax.jit(lambda x: x + 1), jnp.zeros(()))
    q, k, v, do = problem.arrays(dtype=jnp.bfloat16)

    def gist(implementation):
        return lambda q, k, v: gist_attention(q, k, v, spec=spec, implementation=implementation)

    def cudnn(window):
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    levels, tokens = (q, k, v, do), (q[0], k[0], v[0], do[0])
    programs = {
        "dense": (cudnn(None), tokens),
        "sliding": (cudnn((spec.window, 0)), tokens),
        "gist": (gist("mosaic_gpu"), levels),
        "xla": (gist("xla"), levels),
    }
    for name, (attend, arrays) in programs.items():
        for what, program in (("forward", attend), ("both", forward_and_backward(attend))):
            yield found | {"under_way": f"{name}, {what}"}
            given = arrays if what == "both" else arrays[:3]
            try:
                found[f"{what}_ms"][name] = milliseconds(jax.jit(program), *given)
            except Exception as error:
                found.setdefault("failed", {})[f"{name}, {what}"] = reason(error)
    yield found


def ring(batch: int, steps: int = 64, tokens: int = 2**25) -> Iterator[dict]:
    """Microseconds of a decode step's attention over the rings of a session, by XLA, then by the kernel; each guarded."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistCache, GistSpec, gist_decode, init_gist_cache

    spec = GistSpec(levels=5)
    empty = init_gist_cache(spec, batch, tokens, HEADS, HEAD_DIM, jnp.bfloat16)
    k, v, q = (
        jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        for i, x in enumerate((empty.k, empty.v, empty.k[:, :, 0]))
    )
    cache, position_B = GistCache(k, v, empty.sizes), jnp.full(batch, tokens - 1, jnp.int32)
    seen = sum(int(stop - start) for start, stop in spec.key_ranges(0, tokens - 1))
    read = batch * HEADS * seen * HEAD_DIM * 4  # bytes of keys and values
    found = {
        "slots": k.shape[2],
        "seen": seen,
        "floor_us": 1e6 * read / bandwidth(jax.devices()[0].device_kind),
    }
    for implementation in ("xla", "mosaic_gpu"):
        yield found | {"under_way": implementation}

        @jax.jit
        def run(q, cache, implementation=implementation):
            def step(_, q):
                return gist_decode(q, cache, position_B, spec=spec, implementation=implementation)

            return jax.lax.fori_loop(0, steps, step, q)

        try:
            found[f"{implementation}_us"] = 1e3 * milliseconds(run, q, cache) / steps
        except Exception as error:
            found.setdefault("failed", {})[implementation] = reason(error)
    yield found


def bandwidth(device_kind: str) -> float:
    """Bytes per second of a device's memory; NaN where that is not known."""
    return next((rate for name, rate in BANDWIDTH.items() if name in device_kind.lower()), float("nan"))


def bounds(problem) -> dict:
    """What gist attention cannot do without: milliseconds of the pairs seen and of the bytes; the tiles it visits."""
    import jax

    from kernels_pallas.mosaic_gpu.config import TILE, default_config
    from kernels_pallas.mosaic_gpu.tiles import Stream, density, pairs
    from megacontext_jax.telemetry import hardware

    device = jax.devices()[0].device_kind
    peak = hardware.peak_flops(device) or float("nan")
    T, config = problem.tokens, default_config(problem.head_dim)
    stream = Stream(problem.spec, T, TILE)
    heads = problem.batch * problem.heads
    products = problem.pairs() * heads * problem.head_dim / peak
    # one array read or written once
    array = sum(problem.spec.rows(T)) * heads * problem.head_dim * 2 / bandwidth(device)
    return {
        # two products of two operations forward, five backward; q, k, v, o, then with do, dq, dk, dv and again
        "forward_ms": {"floor": 1e3 * max(4 * products, 4 * array)},
        "both_ms": {"floor": 1e3 * max(14 * products, 12 * array)},
        "visited_tiles": len(pairs(stream, TILE, config.key_tile).query),
        "tile_density": density(stream, TILE, config.key_tile),
        "pair_density": problem.pairs() / (T * (T + 1) / 2),
        "device": device,
        "config": str(config),
    }


def forward_and_backward(attend):
    import jax

    def both(q, k, v, do):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    return both


def tuning(T: int, variant: int) -> Iterator[dict]:
    """Milliseconds of gist attention in one of the `tuning_configs`, to hold against the row of `time_T_4`."""
    import jax
    import jax.numpy as jnp

    from kernels_pallas import GistSpec
    from kernels_pallas.mosaic_gpu import gist_attention_mosaic_gpu
    from kernels_pallas.mosaic_gpu.config import tuning_configs
    from kernels_pallas.shapes import Problem

    config = tuning_configs(HEAD_DIM)[variant]
    problem = Problem(T, GistSpec(), 4, HEADS, HEADS, HEAD_DIM)

    def attend(q, k, v):
        return gist_attention_mosaic_gpu(q, k, v, problem.spec, None, HEAD_DIM**-0.5, config)

    arrays = problem.arrays(dtype=jnp.bfloat16)
    found = {"config": str(config)}
    yield found
    found["forward_ms"] = milliseconds(jax.jit(attend), *arrays[:3])
    yield found
    found["both_ms"] = milliseconds(jax.jit(forward_and_backward(attend)), *arrays)
    yield found


def milliseconds(fn, *arrays, seconds: float = 2.0) -> float:
    """Median over 3 to 9 rounds of several calls in a row, so that their launches overlap with what runs.

    `seconds` bounds the rounds of a slow program.
    """
    import jax

    def once(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            out = fn(*arrays)
        jax.block_until_ready(out)
        return (time.perf_counter() - started) / calls

    once(1)  # compiles
    one = max(once(2), 1e-6)
    calls = max(1, min(50, int(0.1 / one)))
    rounds = max(3, min(9, int(seconds / (calls * one))))
    return 1e3 * statistics.median(once(calls) for _ in range(rounds))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def summary(results: dict[str, dict]) -> str:
    """The table of all rows timed, floor first; a dash stands for what was not measured."""

    def number(value, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    names = ("floor", "gist", *RIVALS)
    rows = [
        ("tokens", "batch", "pass", *(f"{n} ms" for n in names), "x dense", "/ (dense x density)", "tiles")
    ]
    for case, found in results.items():
        kind, *rest = case.split("_")
        if kind != "time" or "tile_density" not in found:
            continue
        for what in ("forward", "both"):
            row = found[f"{what}_ms"]
            faster = row["dense"] / row["gist"] if {"dense", "gist"} <= row.keys() else None
            share = None if faster is None else 1 / faster / found["tile_density"]
            visited = f"{found['visited_tiles']} = {100 * found['tile_density']:.1f} %"
            rows.append(
                (
                    *rest,
                    what,
                    *(number(row.get(n)) for n in names),
                    number(faster, 2),
                    number(share, 2),
                    visited,
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(x.rjust(n) for x, n in zip(row, widths, strict=True)) for row in rows)


def flex(T: int) -> Iterator[dict]:
    """PyTorch's flex_attention under the mask of the same pattern, forward and forward with backward."""
    try:
        import torch
    except ModuleNotFoundError:
        yield {"skipped": "no PyTorch here"}
        return
    if not torch.cuda.is_available():
        yield {"skipped": "this PyTorch has no CUDA"}
        return
    import numpy as np
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels_pallas import GistSpec
    from kernels_pallas.mosaic_gpu.tiles import Keys, Stream

    stream = Stream(GistSpec(), T, 128)
    keys = Keys(stream.rows, 128)
    ranges = torch.as_tensor(stream.ranges()).cuda()  # [levels, 2, rows]
    counts = [keys.tiles(m) * keys.tile for m in range(len(keys.rows))]
    level = torch.as_tensor(np.repeat(np.arange(len(counts)), counts)).cuda()
    row = torch.as_tensor(np.concatenate([np.arange(n) for n in counts])).cuda()
    R, S = stream.length, sum(counts)

    def seen(b, h, q, k):
        return (row[k] >= ranges[level[k], 0, q]) & (row[k] < ranges[level[k], 1, q])

    mask = create_block_mask(seen, None, None, R, S, device="cuda")
    attend = torch.compile(flex_attention)
    arrays = [
        torch.randn(4, HEADS, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (R, S, S)
    ]
    do = torch.randn_like(arrays[0])

    def forward():
        return attend(*arrays, block_mask=mask)

    def both():
        out = forward()
        torch.autograd.grad(out, arrays, do)

    def measure(fn) -> float:
        for _ in range(3):
            fn()
        times = []
        for _ in range(9):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(5):
                fn()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / 5)
        return 1e3 * statistics.median(times)

    found = {"torch": torch.__version__}
    yield found
    found["forward_ms"] = measure(forward)
    yield found
    found["both_ms"] = measure(both)
    yield found
