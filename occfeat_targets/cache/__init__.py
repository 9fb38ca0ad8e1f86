"""The cache: what is in it, how it is written and read. NumPy and zarr, nothing else.

The contract between the two halves: the trainer imports this package of `occfeat_targets` and no other.
"""
