"""Attention over parts of the keys, merged, and the difference that a part leaves."""
