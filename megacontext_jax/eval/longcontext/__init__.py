"""The tiny long-context suite: generated tasks that a small model learns on a CPU in minutes."""
