"""What all parts and both halves share: command lines, paths, messages, progress, compiled functions. It imports nothing of ours."""
