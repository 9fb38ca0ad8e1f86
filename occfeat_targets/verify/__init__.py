"""Checks of a cache against its records, and of random keyframes against slow, obvious code. Does not use `build`."""
