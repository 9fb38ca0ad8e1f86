"""From a cache to batches: sample order, prefetching, augmentation. Imports `ops`, and `occfeat_targets.cache`."""
