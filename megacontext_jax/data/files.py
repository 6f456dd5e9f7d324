"""The former place of `megacontext_jax.files`."""

from megacontext_jax.files import write_bytes

__all__ = ["write_bytes"]
