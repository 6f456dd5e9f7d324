"""Training: optimiser, sharding, step, loop, checkpoint."""
