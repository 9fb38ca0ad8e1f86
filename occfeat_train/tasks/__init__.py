"""What a network is trained for: heads, losses, metrics (paper 3.2, 3.3). Imports `data` and `networks`."""
