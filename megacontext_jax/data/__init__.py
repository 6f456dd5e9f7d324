"""Tokenizer, shards, streams and conversations. Nothing here imports JAX: Grain's workers load it."""
