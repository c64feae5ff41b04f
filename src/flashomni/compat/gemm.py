"""The authors' two projections, ``flashomni_gemm`` (to queries) and ``flashomni_gemm_reduction``.

Letters in shapes: B batch, M rows, K in_features, N out_features, H num_qo_heads. In the signatures
``A`` is the input and ``B`` the weight, as in the authors' package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.compat.packing import check_segments, num_bytes, unpack_rows
from flashomni.kernels import sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.common.checks import check_device, check_dtype, check_shape, float_dtypes
from flashomni.symbols import Grid, Symbols, pack_bits, q_bytes, row_bytes


def flashomni_gemm(
    A: Tensor,
    B: Tensor,
    num_qo_heads: int,
    sparse_info: Tensor | None = None,
    sparse_info_indptr: Tensor | None = None,
    num_text_tokens: int = 512,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    sparse_q_size: int = 128,
    is_full: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Project the computed (query block, head) tiles: ``A @ B.T + bias``.

    Row r belongs to query block ``(num_text_tokens + r) // sparse_q_size``. Cached tiles of ``out``
    are not written; in a new ``out`` they are zero (theirs are undefined). M, N and K may have any
    size that a backend takes, and ``num_text_tokens`` need not be a multiple of the block.

    Args:
        A: ``[B, M, K]``, a run of tokens.
        B: ``[N, K]``, dtype of A; head h has rows ``h * N / H`` on.
        num_qo_heads: H.
        sparse_info: uint8, S_c of all requests in the authors' packing; not read if ``is_full``.
        sparse_info_indptr: int32 ``[B + 1]``, the byte at which each request starts.
        num_text_tokens: position of ``A[:, 0]`` in the sequence of the symbols. The default is the
            authors'; it must be 0 when A holds the whole sequence.
        bias: ``[N]`` or ``None``.
        out: ``[B, M, N]``, last dim contiguous.
        sparse_q_size: tokens of a query block, a positive multiple of 16.
        is_full: compute every tile.
        backend: one of ours, for tests and comparisons; by default the best that accepts.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or the symbols are too short.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    shape = _check_operands(A, B)
    head_dim = _head_dim("B", B.shape[0], "rows", num_qo_heads)
    _check_like("bias", bias, shape[-1:], A)
    _check_like("out", out, shape, A)
    if is_full:
        num_text_tokens = 0
        grid = _grid(A, 0, sparse_q_size)
        symbols = Symbols.dense(grid, A.shape[0], num_qo_heads, A.device)
    else:
        live, grid = _live(
            A, num_qo_heads, sparse_info, sparse_info_indptr, num_text_tokens, sparse_q_size
        )
        symbols = _row_symbols(live, grid)
    if out is None:
        out = A.new_zeros(shape)
    tiles = out.unflatten(-1, (num_qo_heads, head_dim))
    sparse_gemm_q(A, B, bias, symbols, row_offset=num_text_tokens, out=tiles, backend=backend)
    return out


def flashomni_gemm_reduction(
    A: Tensor,
    B: Tensor,
    num_qo_heads: int,
    sparse_info: Tensor,
    sparse_info_indptr: Tensor,
    num_text_tokens: int,
    bias: Tensor | None = None,
    is_for_cache: bool = False,
    sparse_q_size: int = 128,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sum the projections of some heads of each row: the cached ones, or the computed ones.

    With A_h and W_h the columns of head h in A and B, and S_c that of the row's query block::

        is_for_cache=True    bias [N]       + sum over h with S_c = 0 of A_h @ W_h.T
        is_for_cache=False   bias [B, M, N] + sum over h with S_c = 1 of A_h @ W_h.T

    The first result, or a forecast of it, is the bias of the second: the linear layer's own bias
    enters only there. Heads left out are not read, they may be undefined. A head has K / H columns
    (theirs takes N / H, which is wrong for a projection that is not square).

    Args:
        A: ``[B, M, K]``, attention output, heads side by side.
        B: ``[N, K]``, dtype of A.
        num_qo_heads: H.
        sparse_info: uint8, S_c of all requests in the authors' packing.
        sparse_info_indptr: int32 ``[B + 1]``, the byte at which each request starts.
        num_text_tokens: position of ``A[:, 0]`` in the sequence of the symbols.
        bias: ``[N]`` if ``is_for_cache``, else ``[B, M, N]``; ``None`` adds nothing.
        is_for_cache: sum the cached heads.
        sparse_q_size: tokens of a query block, a positive multiple of 16.
        backend: one of ours, for tests and comparisons; by default the best that accepts.

    Returns:
        ``[B, M, N]``, every element written.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or the symbols are too short.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    shape = _check_operands(A, B)
    head_dim = _head_dim("A", A.shape[2], "columns", num_qo_heads)
    _check_like("bias", bias, shape[-1:] if is_for_cache else shape, A)
    live, grid = _live(
        A, num_qo_heads, sparse_info, sparse_info_indptr, num_text_tokens, sparse_q_size
    )
    linear_bias, terms, weights = bias, None, None
    if bias is not None and not is_for_cache:
        linear_bias, terms = None, bias[None]
        weights = torch.ones(1, dtype=torch.float32, device=A.device)
    return sparse_gemm_o(
        A.unflatten(-1, (num_qo_heads, head_dim)),
        B,
        linear_bias,
        _row_symbols(~live if is_for_cache else live, grid),
        terms,
        weights,
        row_offset=num_text_tokens,
        backend=backend,
    )


def _check_operands(A: Tensor, B: Tensor) -> tuple[int, int, int]:
    """Check input and weight; the shape of the result."""
    check_dtype("A", A, float_dtypes)
    if A.ndim != 3 or A.shape[1] < 1:
        raise ValueError(f"A must be [B, M, K] with M at least 1, got {list(A.shape)}")
    if B.ndim != 2 or B.shape[1] != A.shape[2]:
        raise ValueError(f"B must be [N, {A.shape[2]}], got {list(B.shape)}")
    _check_like("B", B, tuple(B.shape), A)
    return A.shape[0], A.shape[1], B.shape[0]


def _check_like(name: str, tensor: Tensor | None, shape: tuple[int, ...], A: Tensor) -> None:
    if tensor is not None:
        check_shape(name, tensor, shape)
        check_dtype(name, tensor, (A.dtype,))
        check_device(name, tensor, A.device)


def _head_dim(name: str, size: int, what: str, num_qo_heads: int) -> int:
    if num_qo_heads < 1 or size % num_qo_heads:
        raise ValueError(
            f"num_qo_heads must divide the {size} {what} of {name}, got {num_qo_heads}"
        )
    return size // num_qo_heads


def _grid(A: Tensor, num_text_tokens: int, sparse_q_size: int) -> Grid:
    """Blocks of the rows up to the last one of A; there are no keys in a projection."""
    if num_text_tokens < 0:
        raise ValueError(f"num_text_tokens must be at least 0, got {num_text_tokens}")
    if sparse_q_size < 16 or sparse_q_size % 16:
        raise ValueError(f"sparse_q_size must be a positive multiple of 16, got {sparse_q_size}")
    return Grid(num_text_tokens + A.shape[1], 1, block_m=sparse_q_size)


def _live(
    A: Tensor,
    num_qo_heads: int,
    sparse_info: Tensor | None,
    sparse_info_indptr: Tensor | None,
    num_text_tokens: int,
    sparse_q_size: int,
) -> tuple[Tensor, Grid]:
    """S_c as bool ``[B, H, Mb]``, and what it is about."""
    grid, batch = _grid(A, num_text_tokens, sparse_q_size), A.shape[0]
    rows = f"num_text_tokens + rows = {num_text_tokens} + {A.shape[1]}"
    what = f"{batch} requests of {rows} tokens and {num_qo_heads} heads"
    size = batch * num_bytes(grid.num_q_blocks * num_qo_heads)
    packed, indptr = check_segments(
        "sparse_info", sparse_info, sparse_info_indptr, batch, size, what, A.device
    )
    return unpack_rows(packed, indptr, grid.num_q_blocks, num_qo_heads), grid


def _row_symbols(live: Tensor, grid: Grid) -> Symbols:
    """Symbols of S_c alone: projections do not read S_s, one row of it stands for all."""
    q_bits = pack_bits(live, q_bytes(grid.num_q_blocks))
    kv_bits = q_bits.new_zeros(row_bytes(1)).expand(*live.shape, -1)
    return Symbols(q_bits, kv_bits, grid)
