"""Data sets, one file and a row of `source.SOURCES` each: keyframes with paths, transforms, boxes and maps. Imports `cache`."""
