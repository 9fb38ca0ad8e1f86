"""Reproduction and import of the reference repository, aharley/simple_bev. Imports networks, tasks and training."""
