"""Measurements: reconstruction, codebook use, likelihood, and the report that holds them."""
