"""Training tasks: heads, losses and metrics (paper 3.2, 3.3). Imports `data` and `networks`."""
