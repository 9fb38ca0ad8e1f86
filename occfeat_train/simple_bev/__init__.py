"""Import of checkpoints of the reference repository, aharley/simple_bev."""
