"""Slots of rings in shared memory: where a running number lies, and in which round.

Numbers are never negative. Written with masks and shifts, since a loop over visits has room for
few instructions: those of both warpgroups share a cache of 12 KB.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def slot(number, STAGES: gl.constexpr):
    if STAGES & (STAGES - 1) == 0:
        return number & (STAGES - 1)
    else:
        return number % STAGES


@gluon.jit
def parity(number, STAGES: gl.constexpr):
    """Of the round of ``number``: 0 in the first."""
    if STAGES == 1:
        return number & 1
    elif STAGES == 2:
        return (number >> 1) & 1
    elif STAGES == 4:
        return (number >> 2) & 1
    else:
        return (number // STAGES) & 1
