"""Tuned configurations of the portable kernels, as data: (arch, head_dim, bytes) -> Config.

``arch`` is ``sm80``, ``sm90``, ... or ``hip``; head_dim is padded to a power of two; bytes is the
size of an element. What an arch does not list it takes from ``GENERIC``, which needs at most 99 KB
of shared memory. ``tools/sweep_portable.py`` measures candidates.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel tiles: ``tile_n`` keys of attention or features of a GEMM, ``tile_k`` of K."""

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int


Table = dict[tuple[str, int, int], Config]
GENERIC = "generic"

# tile_k is of no meaning here: a tile holds the whole head_dim.
ATTENTION: Table = {
    (GENERIC, 16, 2): Config(64, 64, 16, 4, 2),
    (GENERIC, 32, 2): Config(64, 64, 32, 4, 2),
    (GENERIC, 64, 2): Config(128, 64, 64, 4, 2),
    (GENERIC, 128, 2): Config(128, 64, 128, 8, 2),
    (GENERIC, 256, 2): Config(64, 32, 256, 4, 2),
    (GENERIC, 16, 4): Config(64, 32, 16, 4, 2),
    (GENERIC, 32, 4): Config(64, 32, 32, 4, 2),
    (GENERIC, 64, 4): Config(64, 32, 64, 4, 2),
    (GENERIC, 128, 4): Config(32, 32, 128, 4, 2),
    (GENERIC, 256, 4): Config(16, 32, 256, 4, 2),
    ("sm80", 64, 2): Config(128, 64, 64, 4, 3),
    ("sm80", 128, 2): Config(128, 64, 128, 8, 3),
    ("sm80", 256, 2): Config(128, 32, 256, 8, 2),
    ("sm90", 64, 2): Config(128, 128, 64, 8, 3),
    ("sm90", 128, 2): Config(64, 64, 128, 4, 3),
    ("sm90", 256, 2): Config(128, 64, 256, 8, 2),
}

# tile_n is head_dim: a tile is one head, so that its norm and RoPE stay in registers.
GEMM_Q: Table = {
    (GENERIC, 16, 2): Config(128, 16, 64, 4, 3),
    (GENERIC, 32, 2): Config(128, 32, 64, 4, 3),
    (GENERIC, 64, 2): Config(128, 64, 64, 4, 3),
    (GENERIC, 128, 2): Config(128, 128, 32, 8, 3),
    (GENERIC, 256, 2): Config(64, 256, 32, 8, 3),
    (GENERIC, 16, 4): Config(64, 16, 32, 4, 2),
    (GENERIC, 32, 4): Config(64, 32, 32, 4, 2),
    (GENERIC, 64, 4): Config(64, 64, 32, 4, 2),
    (GENERIC, 128, 4): Config(32, 128, 32, 4, 2),
    (GENERIC, 256, 4): Config(32, 256, 16, 8, 2),
    ("sm80", 128, 2): Config(128, 128, 32, 8, 4),
    ("sm90", 64, 2): Config(128, 64, 64, 4, 4),
    ("sm90", 128, 2): Config(128, 128, 64, 8, 4),
    ("sm90", 256, 2): Config(128, 256, 64, 8, 3),
}

# head_dim is that of the heads; features are cut into tile_n whatever their number.
GEMM_O: Table = {
    (GENERIC, 16, 2): Config(128, 128, 16, 4, 3),
    (GENERIC, 32, 2): Config(128, 128, 32, 4, 3),
    (GENERIC, 64, 2): Config(128, 128, 32, 4, 3),
    (GENERIC, 128, 2): Config(128, 128, 32, 8, 3),
    (GENERIC, 256, 2): Config(128, 128, 32, 8, 3),
    (GENERIC, 16, 4): Config(64, 64, 16, 4, 2),
    (GENERIC, 32, 4): Config(64, 64, 32, 4, 2),
    (GENERIC, 64, 4): Config(64, 64, 32, 4, 2),
    (GENERIC, 128, 4): Config(64, 64, 32, 4, 2),
    (GENERIC, 256, 4): Config(64, 64, 32, 4, 2),
    ("sm80", 64, 2): Config(128, 128, 32, 8, 4),
    ("sm80", 128, 2): Config(128, 128, 32, 8, 4),
    ("sm90", 64, 2): Config(128, 128, 64, 8, 4),
    ("sm90", 128, 2): Config(128, 128, 64, 8, 4),
    ("sm90", 256, 2): Config(128, 128, 64, 8, 4),
}
