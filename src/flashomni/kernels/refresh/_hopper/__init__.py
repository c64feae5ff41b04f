"""The parts of the Hopper kernel of a refresh: its messages, its producer and its consumers.

A tile visits its live blocks, then the summaries of the others, then the others themselves, each
part from its last block to its first. Where a part ends nothing is under way in the tensor cores:
there the state of the softmax is what attention over the keys so far has, and sparse attention is
stored. What is common to all attention is in ``attention._hopper``.
"""
