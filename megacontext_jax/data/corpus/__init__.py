"""The built-in corpus: a generated small world beside the English of the Python installation."""

from megacontext_jax.data.corpus.build import GENERATOR_VERSION, MANIFEST, build, built_files

__all__ = ["GENERATOR_VERSION", "MANIFEST", "build", "built_files"]
