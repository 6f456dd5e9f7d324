"""PyTorch nanochat's files, in and out, without PyTorch."""
