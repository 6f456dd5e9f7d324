"""Gist attention: near tokens raw, the past through rows of ever coarser levels."""

from kernels_pallas.api import Refused, choose, describe, gist_attention
from kernels_pallas.decode import GistCache, gist_decode, init_gist_cache
from kernels_pallas.spec import GistSpec

__all__ = [
    "GistCache",
    "GistSpec",
    "Refused",
    "choose",
    "describe",
    "gist_attention",
    "gist_decode",
    "init_gist_cache",
]
