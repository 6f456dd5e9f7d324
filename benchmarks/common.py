"""What several benchmarks share."""

import statistics
import time

from megacontext_jax.telemetry import hardware


def machine() -> str:
    return f"{hardware.cpu_model()}, {hardware.usable_cpus()} cores"


def gemm_gflops(n: int = 1024) -> float:
    """Measured float32 matrix product of this process's JAX, GFLOP/s."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((n, n))
    f = jax.jit(lambda x: x @ x)
    f(a).block_until_ready()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        f(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times) / 1e9
