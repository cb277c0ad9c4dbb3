"""Weights of 8 and 4 bits: `formats` (which know no model), the `plan` that gives each role of a weight its format, and
`modules` that compute with them on any device and backend."""
