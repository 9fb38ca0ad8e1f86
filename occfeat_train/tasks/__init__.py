"""Tasks: the data they read, their heads, losses and metrics (paper 3.2, 3.3). Imports `data`, `networks` and `ops`."""
