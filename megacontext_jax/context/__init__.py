"""The parts of MegaContext as pure functions over arrays of fixed shape: tree, gists, layouts, lens, allocator, losses."""
