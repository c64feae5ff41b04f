"""The parts of the Hopper attention kernel, in the order in which a tile passes through them.

``frame`` is the memory that its partitions share, ``messages`` how they talk, ``producer`` decides
and loads, ``softmax`` weighs, ``consumer`` computes and stores. The kernel itself and its launch
are in ``sm90``.
"""
