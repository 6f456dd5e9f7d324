"""Gist attention for Hopper GPUs, written in Pallas for Mosaic GPU: bfloat16 in and out, float32 sums."""

from kernels_pallas.mosaic_gpu.call import gist_attention_mosaic_gpu

__all__ = ["gist_attention_mosaic_gpu"]
