"""Contents of a cache, and reading and writing it: NumPy and zarr only. The trainer imports this package, `common`, and for its report `pictures`."""
