"""Data sets: keyframes with every path, transform, box and map that the targets need. Imports `cache`."""
