"""occfeat_targets: the offline half of OccFeat. A nuScenes dataroot in, a cache of pretraining targets out."""
