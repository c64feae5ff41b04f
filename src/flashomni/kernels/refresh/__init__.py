"""Sparse attention and what dense attention has more, in one pass over all keys."""
