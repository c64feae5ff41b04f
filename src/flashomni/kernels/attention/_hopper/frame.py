"""What the partitions of a kernel share: tiles in shared memory, and barriers that guard them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashomni.kernels.attention._hopper.messages import DEPTH


@gluon.jit
def allocate_tiles(
    q_desc, k_desc, v_desc, o_desc, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
):  # fmt: skip
    """Rings of tiles of q, k and v, and a tile of out for each warpgroup."""
    dtype: gl.constexpr = q_desc.dtype
    TILE_M: gl.constexpr = q_desc.block_type.shape[2]
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[3]
    o_block: gl.constexpr = o_desc.block_type.shape
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, TILE_M, HEAD_DIM], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [K_STAGES, 1, 1, TILE_N, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [V_STAGES, 1, 1, TILE_N, HEAD_DIM], v_desc.layout)
    o_smem0 = gl.allocate_shared_memory(dtype, o_block, o_desc.layout)
    o_smem1 = gl.allocate_shared_memory(dtype, o_block, o_desc.layout)
    return q_smem, k_ring, v_ring, o_smem0, o_smem1


@gluon.jit
def allocate_barriers(Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr):
    """Barriers of the rings and of the inbox: a slot is full, a slot is empty."""
    flag: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], flag)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], flag)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], flag)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], flag)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], flag)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], flag)
    inbox_full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], flag)
    inbox_empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], flag)
    return q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty


@gluon.jit
def _init(full, empty, STAGES: gl.constexpr):
    """One producer fills a slot, two warpgroups empty it."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)


@gluon.jit
def init_barriers(barriers, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr):
    """Initialise the barriers, before anybody waits for one."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, inbox_full, inbox_empty = barriers
    _init(q_full, q_empty, Q_STAGES)
    _init(k_full, k_empty, K_STAGES)
    _init(v_full, v_empty, V_STAGES)
    _init(inbox_full, inbox_empty, DEPTH)
