"""Surround images -> F_B: encoder, lifting, decoder (paper 3.1). Imports `ops`."""
