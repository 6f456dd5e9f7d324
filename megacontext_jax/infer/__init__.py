"""Inference: cached generation on the device, sampling, the calculator tool, chat."""
