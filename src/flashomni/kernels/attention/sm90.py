"""Block-sparse attention for Hopper GPUs, in Gluon.

One persistent grid, one program per multiprocessor, three partitions: a producer warp reads the
symbols and loads tiles through TMA, two consumer warpgroups own 64 query rows each. A *tile* is
128 query tokens of one head; a *visit* is one tile of keys and values for it. What makes it fast:

* The producer alone decodes symbols. It runs ahead of the consumers and sends them, per tile, the
  number of visits; they never see a bit. Cached tiles never leave the producer.
* The softmax is anchored in bf16: the first visit of a tile fixes the reference of its rows. Tiles
  that leave the range which this allows are found, and done again online by the same program once
  it has seen all of its tiles: no second launch, no list, nothing to wait for on the host.
* Scores of visit j + 1 are issued before the values of visit j, also across the border of two
  tiles, so that the tensor cores have work during the softmax and the epilogue.
* A ragged last block of keys is visited first; only the first visit of a tile is ever masked.
* Summaries of skipped blocks are visits behind the others. The producer turns the bits that were
  left out into what is added to their scores, tile by tile, beside the keys.

The parts are in ``_hopper``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashomni.dispatch import not_on, register
from flashomni.kernels.attention._empty_tiles import empty_batch_items
from flashomni.kernels.attention._forecast_tiles import write_forecast_tiles
from flashomni.kernels.attention._hopper.consumer import consumer
from flashomni.kernels.attention._hopper.frame import (
    allocate_barriers,
    allocate_tiles,
    init_barriers,
)
from flashomni.kernels.attention._hopper.messages import DEPTH, WORDS
from flashomni.kernels.attention._hopper.producer import producer
from flashomni.kernels.attention._tile_order import LISTED, tile_order
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common.configs import DEFAULT, entry, places
from flashomni.kernels.common.hopper import (
    descriptor,
    hopper_refusals,
    is_hopper,
    layout_refusals,
    num_multiprocessors,
    on_device,
)
from flashomni.symbols import Symbols

TILE_M = 128
LOG2_E = 1.4426950408889634


# ---------------------------------------------------------------- kernel


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "tiles_m", "num_heads", "group", "seqlen_q", "seqlen_kv",
        "row_words", "q_stride_b", "q_stride_h", "kv_stride_b", "kv_stride_h", "kv_stride_m",
        "lse_stride_b", "lse_stride_h", "lse_stride_m", "log_n_stride",
    ]
)  # fmt: skip
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, q_bits, kv_bits, kv_len_ptr, order, redo, redone,
    scale_log2, num_tiles, tiles_m, num_heads, group, seqlen_q, seqlen_kv, row_words,
    q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m,
    lse_stride_b, lse_stride_h, lse_stride_m,
    mean_k_desc, mean_v_desc, log_n, log_n_stride,
    PER_BLOCK: gl.constexpr, MAX_WORDS: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr,
    Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    IS_SPARSE: gl.constexpr, IS_RAGGED: gl.constexpr, HAS_KV_LEN: gl.constexpr,
    HAS_LSE: gl.constexpr, ANCHORED: gl.constexpr, SUMMARIES: gl.constexpr,
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
    symbols = (
        q_bits, kv_bits, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m, row_words,
    )  # fmt: skip
    lse_strides = (lse_stride_b, lse_stride_h, lse_stride_m)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem0, barriers, inbox, scale_log2,
                    lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES,
                    V_STAGES, IS_RAGGED, HAS_LSE, ANCHORED, 0,
                ),
            ),
            (
                consumer,
                (
                    o_desc, q_smem, k_ring, v_ring, bias_ring, o_smem1, barriers, inbox, scale_log2,
                    lse_ptr, lse_strides, seqlen_q, TILE_N, HEAD_DIM, COLUMNS, Q_STAGES, K_STAGES,
                    V_STAGES, IS_RAGGED, HAS_LSE, ANCHORED, 1,
                ),
            ),
            (
                producer,
                (
                    q_desc, k_desc, v_desc, q_smem, k_ring, v_ring, barriers, inbox, symbols,
                    sizes, summary, kv_len_ptr, order, redo, redone, PER_BLOCK, MAX_WORDS,
                    Q_STAGES, K_STAGES, V_STAGES, IS_SPARSE, IS_RAGGED, HAS_KV_LEN, LISTED,
                    SUMMARIES, ANCHORED,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---------------------------------------------------------------- host


@dataclass(frozen=True)
class Config:
    """How a head_dim runs: bytes of shared memory and registers decide.

    Args:
        head_dim: columns of a tile; what a tensor lacks reads as zero.
        tile_n: keys per visit.
        q_stages: query tiles under way.
        k_stages: key tiles under way.
        v_stages: value tiles under way.
        registers: of a consumer thread and of a producer thread.
        overlapped: whether the grid starts while the order of its tiles is still being built.
    """

    head_dim: int
    tile_n: int
    q_stages: int
    k_stages: int
    v_stages: int
    registers: tuple[int, int] = (240, 24)
    overlapped: bool = True

    def columns(self, head_dim: int) -> int:
        """Columns that scores are made of: a multiple of 16, half of the tile plus 16, 32 ..."""
        half = self.head_dim // 2
        rest = next((n for n in (16, 32, 64) if head_dim <= half + n), half)
        return half + rest if rest < half else self.head_dim


@functools.cache
def choose_config(
    head_dim: int, block_n: int, where: tuple[str, ...] = ("sm_90", DEFAULT)
) -> Config:
    """The configuration for a head_dim up to 256 and symbols of ``block_n`` keys.

    Args:
        head_dim: of the tensors.
        block_n: a multiple of 64.
        where: the files of configurations that are asked, in order.
    """
    columns = next(size for size in (64, 128, 256) if head_dim <= size)
    key = {"head_dim": columns, "block_n": 64 if block_n % 128 else 128}
    found = dict(entry("attention/sm90", where, **key))
    return Config(columns, **found | {"registers": tuple(found["registers"])})


def attention_refusals(call: AttentionCall) -> list[str]:
    q, symbols = call.q, call.symbols
    if q.device.type != "cuda":
        return not_on("cuda", q)
    if not is_hopper(q.device.index):
        return [f"{q.device} is not of compute capability 9.0"]
    reasons = []
    if q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {str(q.dtype)[6:]}")
    head_dim = q.shape[3]
    if head_dim % 8 or head_dim > 256:
        reasons.append(f"head_dim must be a multiple of 8 up to 256, got {head_dim}")
    if min(q.numel(), call.k.numel()) == 0:
        reasons.append("q, k and v must not be empty")
    if call.softmax_scale <= 0:
        reasons.append(f"softmax_scale must be positive, got {call.softmax_scale}")
    for name, x in (("q", q), ("k", call.k), ("v", call.v), ("out", call.out)):
        reasons += layout_refusals(name, x)
    if symbols is not None:
        grid = symbols.grid
        if grid.block_m != TILE_M:
            reasons.append(f"block_m must be {TILE_M}, got {grid.block_m}")
        if grid.block_n % 64:
            reasons.append(f"block_n must be a multiple of 64, got {grid.block_n}")
        if grid.num_kv_blocks >= 1 << 20:
            reasons.append(f"there must be fewer than 2**20 key blocks, got {grid.num_kv_blocks}")
        reasons += _symbol_refusals(symbols)
    if call.summary is not None:
        reasons += _summary_refusals(call)
    return reasons


def _summary_refusals(call: AttentionCall) -> list[str]:
    """A tile of summaries holds those of one block or of many whole words of blocks."""
    summary, per_block = call.summary, call.summaries_per_block
    if summary is None:
        return []
    reasons = layout_refusals("summary.k", summary.k) + layout_refusals("summary.v", summary.v)
    if per_block & (per_block - 1) or per_block > 64:
        reasons.append(f"summaries of a block must be a power of two up to 64, got {per_block}")
    return reasons


def _symbol_refusals(symbols: Symbols) -> list[str]:
    """Rows of S_s are read as 32-bit words."""
    q_bits, kv_bits = symbols.q_bits, symbols.kv_bits
    strides = kv_bits.stride()
    if q_bits.stride(-1) != 1 and q_bits.shape[-1] > 1:
        return ["q_bits must be contiguous in their last dim"]
    if kv_bits.numel() >= 1 << 31:
        return [f"kv_bits must have less than 2**31 bytes, got {kv_bits.numel()}"]
    if strides[-1] != 1 or any(stride % 4 for stride in strides[:-1]) or kv_bits.data_ptr() % 4:
        return ["rows of kv_bits must be contiguous and start at multiples of 4 bytes"]
    return []


@register(
    "attention", "sm90", rank=40, refuses=attention_refusals,
    available=hopper_refusals, device="cuda",
)  # fmt: skip
def run(call: AttentionCall) -> None:
    block_n = 128 if call.symbols is None else call.symbols.grid.block_n
    with on_device(call.q.device):
        launch(call, choose_config(call.q.shape[3], block_n, places(call.q.device)))


def launch(call: AttentionCall, config: Config) -> None:
    """Compute ``call`` with a given configuration, on the current device."""
    write_forecast_tiles(call)
    q, k, v, out, lse, symbols = call.q, call.k, call.v, call.out, call.lse, call.symbols
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_kv = k.shape[1]
    tiles_m = -(-seqlen_q // TILE_M)
    num_tiles = batch * num_heads * tiles_m
    num_programs = min(num_multiprocessors(q.device.index), num_tiles)
    tile_n, columns = config.tile_n, config.head_dim
    order, q_bits, kv_bits = None, None, None
    per_block, row_words, max_words = 1, 0, 32
    symbol_strides: tuple[int, ...] = (0, 0, 0, 0, 0)
    if symbols is not None:
        order = tile_order(call, symbols, TILE_M, num_programs, overlapped=config.overlapped)
        q_bits, kv_bits = symbols.q_bits, symbols.kv_bits.view(torch.int32)
        per_block, row_words = symbols.grid.block_n // tile_n, kv_bits.shape[-1]
        max_words = max(32, 1 << (row_words - 1).bit_length())
        symbol_strides = (*q_bits.stride()[:2], *kv_bits.stride()[:3])
    elif call.kv_len is not None:
        empty_batch_items(call, TILE_M)
    mean_k = mean_v = log_n = None
    if call.summary is not None:
        mean_k, mean_v = (descriptor(x, tile_n, columns) for x in (call.summary.k, call.summary.v))
        log_n = call.summary.log_n.contiguous()
    anchored = q.dtype == torch.bfloat16 and not call.online
    # One word a tile, for the list of those that are done again: nobody reads what nobody wrote.
    redo = torch.empty(num_tiles, dtype=torch.int32, device=q.device) if anchored else None
    attention_kernel[(num_programs,)](
        descriptor(q, TILE_M, columns),
        descriptor(k, tile_n, columns),
        descriptor(v, tile_n, columns),
        descriptor(out, TILE_M // 2, min(columns, 128)),
        lse,
        q_bits,
        kv_bits,
        call.kv_len,
        order,
        redo,
        call.redone if anchored else None,
        call.softmax_scale * LOG2_E,
        num_tiles,
        tiles_m,
        num_heads,
        num_heads // k.shape[2],
        seqlen_q,
        seqlen_kv,
        row_words,
        *symbol_strides,
        *((0, 0, 0) if lse is None else lse.stride()),
        mean_k,
        mean_v,
        log_n,
        None if log_n is None else log_n.shape[1],
        PER_BLOCK=per_block,
        MAX_WORDS=max_words,
        LISTED=LISTED,
        COLUMNS=config.columns(head_dim),
        Q_STAGES=config.q_stages,
        K_STAGES=config.k_stages,
        V_STAGES=config.v_stages,
        IS_SPARSE=symbols is not None,
        IS_RAGGED=call.kv_len is not None or seqlen_kv % tile_n != 0 or log_n is not None,
        HAS_KV_LEN=call.kv_len is not None,
        HAS_LSE=lse is not None,
        ANCHORED=anchored,
        SUMMARIES=call.summaries_per_block,
        CONSUMER_REGISTERS=config.registers[0],
        PRODUCER_REGISTERS=config.registers[1],
        num_warps=4,
        launch_pdl=symbols is not None and config.overlapped,
    )
