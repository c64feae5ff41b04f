"""The parts of the Hopper attention kernel, in the order in which a tile passes through them.

``messages`` is how its partitions talk, ``producer`` decides and loads, ``softmax`` weighs,
``consumer`` computes and stores. The kernel itself and its launch are in ``sm90``.
"""
