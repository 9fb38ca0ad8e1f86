"""The targets of one keyframe: occupancy, images, labels, teacher features. Imports `cache` and `sources`."""
