"""Operations of the networks: lifting, sampling, deformable attention, norms. Each fast version has a plain PyTorch reference."""
