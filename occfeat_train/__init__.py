"""occfeat_train: the training half of OccFeat. It needs a cache, and neither data set, devkit nor Dask."""
