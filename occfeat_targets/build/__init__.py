"""From options to a finished cache: planning, assembling keyframes, writing shards. Imports `cache`, `sources` and `targets`."""
