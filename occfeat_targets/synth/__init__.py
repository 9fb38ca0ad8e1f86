"""A synthetic city written as a nuScenes dataroot."""
