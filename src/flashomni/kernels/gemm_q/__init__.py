"""Projection of the computed (query block, head) tiles."""
