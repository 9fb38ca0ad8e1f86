"""Pictures of a keyframe of a cache, for `occfeat-targets preview`."""
