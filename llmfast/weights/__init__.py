"""Weights in files, read a tensor at a time: where a name leads, and Hugging Face's layout in and out."""
