"""Data sets: keyframes with all paths, transforms, boxes and maps that the targets need. Imports `cache`."""
