"""MegaContext on nanochat, in JAX: unbounded memory for a language model at constant cost."""

__version__ = "0.1.0"
