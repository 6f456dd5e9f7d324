"""Checkpoints: one writer per run folder, atomic steps, digests, restore onto another set of devices."""
