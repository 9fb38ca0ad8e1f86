"""Contents of a cache, and reading and writing it: NumPy and zarr only. The trainer imports only this package of `occfeat_targets`."""
