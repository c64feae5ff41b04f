"""What the producer sends the consumers, one message a tile, and what they send back.

Words in shared memory, guarded by two barriers a slot. Consumers read a field when they need it
and return the slot when the tile is stored: registers are dear.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashomni.kernels.attention._hopper.rings import parity, slot
from flashomni.kernels.common.hopper import thread_barrier

BATCH: gl.constexpr = gl.constexpr(0)
HEAD: gl.constexpr = gl.constexpr(1)
ROW: gl.constexpr = gl.constexpr(2)  # its first query token
VISITS: gl.constexpr = gl.constexpr(3)  # 0 ends the stream
# Valid keys of the first visit; with summaries, plus PER_LIVE for each visit that is not of them.
VALID: gl.constexpr = gl.constexpr(4)
BAD: gl.constexpr = gl.constexpr(5)  # from each warpgroup: whether the tile has to be done again
WORDS: gl.constexpr = gl.constexpr(7)
DEPTH: gl.constexpr = gl.constexpr(4)  # messages under way
PER_LIVE: gl.constexpr = gl.constexpr(256)  # more than the keys of a visit


@gluon.jit
def put(inbox, number, field: gl.constexpr, value, NUM_WARPS: gl.constexpr = 1):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    at = inbox.index(slot(number, DEPTH) * WORDS + field)
    at.store(gl.full([1], value, gl.int32, layout=one))


@gluon.jit
def get(inbox, number, field: gl.constexpr, NUM_WARPS: gl.constexpr = 4):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    return gl.max(inbox.index(slot(number, DEPTH) * WORDS + field).load(one), axis=0)


@gluon.jit
def await_slot(inbox_empty, number):
    """Wait until the slot of message ``number`` is free: what it held before is stored."""
    mbarrier.wait(inbox_empty.index(slot(number, DEPTH)), parity(number, DEPTH) ^ 1)


@gluon.jit
def send(inbox, inbox_full, number, batch, head, row, visits, valid):
    """Announce a tile; the slot is free."""
    put(inbox, number, BATCH, batch)
    put(inbox, number, HEAD, head)
    put(inbox, number, ROW, row)
    put(inbox, number, VISITS, visits)
    put(inbox, number, VALID, valid)
    thread_barrier()  # every lane has written; one of them announces it
    mbarrier.arrive(inbox_full.index(slot(number, DEPTH)), count=1)


@gluon.jit
def receive(inbox, inbox_full, number):
    """Wait for a message; how many visits it announces."""
    mbarrier.wait(inbox_full.index(slot(number, DEPTH)), parity(number, DEPTH))
    return get(inbox, number, VISITS)


@gluon.jit
def give_back(inbox_empty, number):
    """The consumers need message ``number`` no more."""
    mbarrier.arrive(inbox_empty.index(slot(number, DEPTH)), count=1)
