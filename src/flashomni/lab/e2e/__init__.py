"""Speed of whole generations at real size, against diffusers' own, in one process.

Real pipelines of diffusers, published configurations, random weights: see ``models``.
"""
