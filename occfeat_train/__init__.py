"""occfeat_train: pretraining, finetuning and evaluation from a cache. It needs no data set, devkit or Dask."""
