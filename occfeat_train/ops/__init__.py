"""Operations of the networks: the mean over the views, deformable attention, norms. Fast ones have a plain PyTorch reference."""
