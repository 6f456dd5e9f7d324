"""The GPT as pure functions over a params pytree."""
