"""Verification of a cache: checksums, and random keyframes against slow, independent code. Does not use `build`."""
