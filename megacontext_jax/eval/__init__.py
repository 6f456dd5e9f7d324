"""Evaluation: bits per byte, held-out generated tasks, chat."""
