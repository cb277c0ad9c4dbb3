"""Weights of 8 and 4 bits: the formats, and modules that compute with them."""
