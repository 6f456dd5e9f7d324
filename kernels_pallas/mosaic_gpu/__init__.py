"""Gist attention for Hopper GPUs: warp-specialised kernels with TMA and wgmma, written in Pallas Mosaic GPU."""

from kernels_pallas.mosaic_gpu.call import gist_attention_mosaic, refusal

__all__ = ["gist_attention_mosaic", "refusal"]
