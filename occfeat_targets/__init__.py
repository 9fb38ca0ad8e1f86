"""occfeat_targets: offline pipeline from a nuScenes dataroot to a cache of pretraining targets."""
