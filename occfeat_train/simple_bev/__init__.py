"""What exists only to import checkpoints of the reference repository, aharley/simple_bev."""
