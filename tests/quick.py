"""Compile in a hurry: XLA's options for tests in which compiling takes longest, as far as this JAX knows them."""

from importlib.metadata import version

OPTIONS: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11):  # later ones have no other emitters
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
"""The same for `XLA_FLAGS`."""
