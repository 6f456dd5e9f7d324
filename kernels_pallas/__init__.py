"""Gist attention: near tokens raw, the past through rows of ever coarser levels."""

from kernels_pallas.api import Refused, gist_attention
from kernels_pallas.spec import GistSpec

__all__ = ["GistSpec", "Refused", "gist_attention"]
