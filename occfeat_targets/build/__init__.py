"""From a command's options to a finished cache: plan, keyframes, shards, and where they run. Imports everything above."""
