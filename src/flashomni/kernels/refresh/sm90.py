"""A refresh on Hopper GPUs, in Gluon: one kernel that visits every block once.

A tile visits its live blocks, the summaries of the others, the others. Behind the summaries it
stores sparse attention; then it takes up the state from before them again, which waited in memory
that stays in L2, and goes on to dense attention. So there are no parts that are rounded before they
are merged, no sums of them, and no second launch. Tiles that overflow the anchored softmax are done
again as in attention. The grid is that of dense attention: every tile costs the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashomni.dispatch import register
from flashomni.kernels.attention._hopper.frame import (
    allocate_barriers,
    allocate_tiles,
    init_barriers,
)
from flashomni.kernels.attention._hopper.messages import DEPTH, WORDS
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.attention.sm90 import (
    LOG2_E,
    TILE_M,
    Config,
    attention_refusals,
    choose_config,
)
from flashomni.kernels.common.configs import DEFAULT, places
from flashomni.kernels.common.hopper import (
    descriptor,
    hopper_refusals,
    num_multiprocessors,
    on_device,
)
from flashomni.kernels.refresh._hopper.consumer import consumer
from flashomni.kernels.refresh._hopper.messages import MAX_VISITS
from flashomni.kernels.refresh._hopper.producer import producer
from flashomni.kernels.refresh.op import RefreshCall, by_parts


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "tiles_m", "num_heads", "group", "seqlen_kv", "row_words", "kv_stride_b",
        "kv_stride_h", "kv_stride_m", "log_n_stride",
    ]
)  # fmt: skip
def refresh_kernel(
    q_desc, k_desc, v_desc, o_desc, d_desc, kv_bits, kv_len_ptr, redo, scale_log2, num_tiles,
    tiles_m, num_heads, group, seqlen_kv, row_words, kv_stride_b, kv_stride_h, kv_stride_m,
    mean_k_desc, mean_v_desc, log_n, log_n_stride, scratch,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    HAS_KV_LEN: gl.constexpr, ANCHORED: gl.constexpr, SUMMARIES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    TILE_N: gl.constexpr = k_desc.block_type.shape[2]
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[3]
    q_smem, k_ring, v_ring, o_smem0, o_smem1 = allocate_tiles(
        q_desc, k_desc, v_desc, o_desc, Q_STAGES, K_STAGES, V_STAGES
    )
    barriers = allocate_barriers(Q_STAGES, K_STAGES, V_STAGES)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    inbox = gl.allocate_shared_memory(gl.int32, [DEPTH * WORDS, 1], word)
    bias_ring, summary = None, None
    if SUMMARIES > 0:
        bias_ring = gl.allocate_shared_memory(gl.float32, [K_STAGES, TILE_N], word)
        summary = (mean_k_desc, mean_v_desc, log_n, log_n_stride, bias_ring)
    init_barriers(barriers, Q_STAGES, K_STAGES, V_STAGES)

    sizes = (num_tiles, tiles_m, num_heads, group, seqlen_kv)
    symbols = (kv_bits, kv_stride_b, kv_stride_h, kv_stride_m, row_words)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem0, barriers, inbox,
                    scratch, scale_log2, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES,
                    ANCHORED, 0,
                ),
            ),
            (
                consumer,
                (
                    o_desc, d_desc, q_smem, k_ring, v_ring, bias_ring, o_smem1, barriers, inbox,
                    scratch, scale_log2, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES, V_STAGES,
                    ANCHORED, 1,
                ),
            ),
            (
                producer,
                (
                    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols,
                    sizes, summary, kv_len_ptr, redo, PER_BLOCK, MAX_WORDS, Q_STAGES, K_STAGES,
                    V_STAGES, HAS_KV_LEN, SUMMARIES, ANCHORED,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _fits(call: RefreshCall) -> bool:
    """Whether the kernel has it; else attention runs over both parts."""
    fits = call.q.shape[3] <= 128 and call.mass is None
    return fits and call.symbols.grid.seqlen_kv // 64 < MAX_VISITS


def _refuses(call: RefreshCall) -> list[str]:
    return attention_refusals(
        AttentionCall(
            call.q, call.k, call.v, call.out, None, call.symbols, call.kv_len, call.softmax_scale,
            summary=call.summary,
        )
    )  # fmt: skip


@register(
    "refresh", "sm90", rank=40, refuses=_refuses, available=hopper_refusals, device="cuda",
)  # fmt: skip
def run(call: RefreshCall) -> None:
    if not _fits(call):
        by_parts(call, "sm90")
        return
    with on_device(call.q.device):
        where = places(call.q.device)
        head_dim, block_n = call.q.shape[3], call.symbols.grid.block_n
        launch(call, refresh_config(head_dim, block_n, call.summaries_per_block, where))


def refresh_config(
    head_dim: int, block_n: int, summaries: int, where: tuple[str, ...] = ("sm_90", DEFAULT)
) -> Config:
    """That of attention, see there; with ``summaries`` consumers have fewer registers.

    Measured on an H200: 1.13 to 1.14 of a dense call, and 1.19 with (240, 24).
    """
    config = choose_config(head_dim, block_n, where)
    return replace(config, registers=(232, 40)) if summaries else config


def launch(call: RefreshCall, config: Config) -> None:
    """Compute ``call`` with a given configuration, on the current device."""
    q, k, symbols = call.q, call.k, call.symbols
    batch, seqlen_q, num_heads, head_dim = q.shape
    tile_n, columns = config.tile_n, config.head_dim
    tiles_m = -(-seqlen_q // TILE_M)
    num_tiles = batch * num_heads * tiles_m
    num_programs = min(num_multiprocessors(q.device.index), num_tiles)
    kv_bits = symbols.kv_bits.view(torch.int32)
    row_words = kv_bits.shape[-1]
    mean_k = mean_v = log_n = scratch = None
    if call.summary is not None:
        mean_k, mean_v = (descriptor(x, tile_n, columns) for x in (call.summary.k, call.summary.v))
        log_n = call.summary.log_n.contiguous()
        scratch = q.new_empty(num_programs * TILE_M * columns, dtype=torch.float32)
    anchored = q.dtype == torch.bfloat16
    redo = torch.empty(num_tiles, dtype=torch.int32, device=q.device) if anchored else None
    refresh_kernel[(num_programs,)](
        descriptor(q, TILE_M, columns),
        descriptor(k, tile_n, columns),
        descriptor(call.v, tile_n, columns),
        descriptor(call.out, TILE_M // 2, columns),
        descriptor(call.difference, TILE_M // 2, columns),
        kv_bits,
        call.kv_len,
        redo,
        call.softmax_scale * LOG2_E,
        num_tiles,
        tiles_m,
        num_heads,
        num_heads // k.shape[2],
        k.shape[1],
        row_words,
        *kv_bits.stride()[:3],
        mean_k,
        mean_v,
        log_n,
        None if log_n is None else log_n.shape[1],
        scratch,
        PER_BLOCK=symbols.grid.block_n // tile_n,
        MAX_WORDS=max(32, 1 << (row_words - 1).bit_length()),
        COLUMNS=config.columns(head_dim),
        Q_STAGES=config.q_stages,
        K_STAGES=config.k_stages,
        V_STAGES=config.v_stages,
        HAS_KV_LEN=call.kv_len is not None,
        ANCHORED=anchored,
        SUMMARIES=call.summaries_per_block,
        CONSUMER_REGISTERS=config.registers[0],
        PRODUCER_REGISTERS=config.registers[1],
        num_warps=4,
    )
