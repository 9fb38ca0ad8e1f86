"""From a cache to batches: order of samples, reference frames, augmentation. Imports `ops` for what a batch samples."""
