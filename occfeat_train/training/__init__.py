"""The loop and everything around it: optimiser, checkpoints, log, evaluation, and the stages of a run."""
