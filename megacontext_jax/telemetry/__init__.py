"""What a run says about itself: metric streams, progress lines, hardware facts, the report and its pictures.

Nothing here imports JAX at module level, so worker processes and plain CPU tools can use all of it.
"""
