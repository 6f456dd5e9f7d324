"""Start-up of JAX for every entry point that computes: platform, compile cache, processes, and what was found."""

import logging
import os

import jax
import jax.numpy as jnp

from megacontext_jax.errors import UserError
from megacontext_jax.mesh import start_distributed
from megacontext_jax.paths import base_dir


def start(run) -> None:
    """Configure JAX from a `RunConfig`; call once, before the first computation."""
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.WARNING)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when a GPU backend starts
    if run.platform:
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[run.platform])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(base_dir() / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    start_distributed(run.coordinator, run.num_processes, run.process_id)
    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"JAX cannot use the platform {run.platform or 'it was given'!r} ({reason}); install the gpu extra or "
            "use --platform cpu."
        ) from None
    if run.min_device_memory_gb and jax.default_backend() == "cpu" and run.platform != "cpu":
        raise UserError(
            f"This configuration is for GPUs of {run.min_device_memory_gb} GB and JAX finds none; install the gpu "
            "extra, mend the driver, use --config run10_cpu, or insist with --platform cpu."
        )


def compute_dtype(run):
    """The dtype of activations: float32 on CPUs, bfloat16 elsewhere, unless asked for."""
    if run.compute_dtype != "auto":
        return jnp.dtype(run.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def print0(*words, file=None) -> None:
    """Print from process 0 only, to standard output or `file`."""
    if jax.process_index() == 0:
        print(*words, file=file, flush=True)
