"""Runs: training loop, optimiser, checkpoints, log, evaluation, and the stages pretrain, finetune and evaluate."""
