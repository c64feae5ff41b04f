"""The authors' packing of symbols: one run of bits a request, padded to a whole byte.

Letters in shapes: B requests, H num_heads, Mb query blocks, Nb key blocks of a request.

The bits of a request lie in the order of ``S_c[Mb, H]`` and ``S_s[Mb, H, Nb]``, little bit order,
rows not aligned to bytes; ``indptr[b]`` is the byte at which request b starts. Heads run faster
than query blocks, the other way round than in :class:`flashomni.Symbols`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from flashomni.kernels.common.checks import check_device, check_dtype
from flashomni.symbols import Grid, Symbols, pack_bits, q_bytes, row_bytes, unpack_bits

INDEX_DTYPES = (torch.int32, torch.int64)


def packbits(x: Tensor, bitorder: str = "big") -> Tensor:
    """Pack a vector of flags into bytes, as ``numpy.packbits`` does.

    The default bit order is the authors'; symbols must be packed with ``"little"``.

    Args:
        x: ``[n]``, any dtype; what is not zero is a 1.
        bitorder: ``"big"`` (first flag in the highest bit) or ``"little"``.

    Returns:
        uint8 ``[ceil(n / 8)]``, padding bits 0.

    Raises:
        ValueError: x is no vector, or the bit order has another name.
    """
    _check_flags(x, bitorder)
    return _pack(x != 0, num_bytes(len(x)), bitorder)


def segment_packbits(x: Tensor, indptr: Tensor, bitorder: str = "big") -> tuple[Tensor, Tensor]:
    """Pack the flags of each request on their own: every request starts at a whole byte.

    The size of the result depends on the values of ``indptr``, so this waits for the device.

    Args:
        x: ``[n]``, any dtype; what is not zero is a 1.
        indptr: int32 or int64 ``[B + 1]``; request b has the flags ``x[indptr[b]:indptr[b + 1]]``.
        bitorder: as in :func:`packbits`.

    Returns:
        uint8 bytes of all requests, and int32 ``[B + 1]``: the byte at which each starts.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or ``indptr`` does not ascend
            within x.
    """
    _check_flags(x, bitorder)
    check_indptr("indptr", indptr)
    check_device("indptr", indptr, x.device)
    ends = host_indptr("indptr", indptr)
    if ends[0] < 0 or ends[-1] > len(x):
        raise ValueError(f"indptr must lie within the {len(x)} flags of x, got {_brief(ends)}")
    lengths = indptr.diff().long()
    packed_indptr = torch.nn.functional.pad(((lengths + 7) // 8).cumsum(0), (1, 0))
    size = sum(num_bytes(stop - start) for start, stop in pairwise(ends))
    shift = 8 * packed_indptr[:-1] - indptr[:-1]
    count = ends[-1] - ends[0]
    target = torch.arange(ends[0], ends[-1], device=x.device)
    target = target + shift.repeat_interleave(lengths, output_size=count)
    flags = torch.zeros(size * 8, dtype=torch.bool, device=x.device)
    flags[target] = x[ends[0] : ends[-1]] != 0
    return _pack(flags, size, bitorder), packed_indptr.to(torch.int32)


def to_packed(symbols: Symbols) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Symbols in the authors' packing, each batch item a request.

    Returns:
        ``(sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr)``: uint8 bytes of
        S_c and S_s, and int32 ``[B + 1]`` for each.
    """
    sparse_info, sparse_info_indptr = _pack_equal(symbols.q_mask().transpose(1, 2))
    sparse_kv_info, sparse_kv_info_indptr = _pack_equal(symbols.kv_mask().transpose(1, 2))
    return sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr


def from_packed(
    sparse_info: Tensor,
    sparse_kv_info: Tensor,
    sparse_info_indptr: Tensor,
    sparse_kv_info_indptr: Tensor,
    grid: Grid,
    num_heads: int,
) -> Symbols:
    """Symbols of B requests of the same lengths, from the authors' packing.

    The bits are taken as they are: a computed row may visit no key block at all, and then its
    output is zero. Does not wait for the device.

    Args:
        sparse_info: uint8, bytes of S_c.
        sparse_kv_info: uint8, bytes of S_s.
        sparse_info_indptr: int32 or int64 ``[B + 1]``, the byte at which each request starts.
        sparse_kv_info_indptr: the same for S_s.
        grid: the blocks of each request.
        num_heads: H, query heads.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or there are too few bytes.
    """
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    check_device("sparse_kv_info", sparse_kv_info, sparse_info.device)
    q_mask = _unpack("sparse_info", sparse_info, sparse_info_indptr, (rows, num_heads))
    shape = (rows, num_heads, columns)
    kv_mask = _unpack("sparse_kv_info", sparse_kv_info, sparse_kv_info_indptr, shape)
    q_bits = pack_bits(q_mask.transpose(1, 2), q_bytes(rows))
    return Symbols(q_bits, pack_bits(kv_mask.transpose(1, 2), row_bytes(columns)), grid)


def unpack_rows(
    sparse_info: Tensor, sparse_info_indptr: Tensor, num_blocks: int, num_heads: int
) -> Tensor:
    """S_c of the first ``num_blocks`` query blocks of each request: bool ``[B, H, num_blocks]``."""
    mask = _unpack("sparse_info", sparse_info, sparse_info_indptr, (num_blocks, num_heads))
    return mask.transpose(1, 2)


def check_segments(
    name: str,
    packed: Tensor | None,
    indptr: Tensor | None,
    batch: int,
    size: int,
    what: str,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Refuse symbols of fewer than ``size`` bytes or for another number of requests.

    Metadata only: where requests start is known to the device alone.
    """
    if packed is None or indptr is None:
        missing = name if packed is None else f"{name}_indptr"
        raise ValueError(f"{missing} must be a tensor, got None")
    check_device(name, packed, device)
    check_device(f"{name}_indptr", indptr, device)
    check_dtype(name, packed, (torch.uint8,))
    check_indptr(f"{name}_indptr", indptr)
    if packed.ndim != 1 or len(packed) < size:
        raise ValueError(
            f"{name} must be a vector of at least {size} bytes for {what}, got {list(packed.shape)}"
        )
    if len(indptr) != batch + 1:
        raise ValueError(f"{name}_indptr must be [{batch + 1}], got {list(indptr.shape)}")
    return packed, indptr


def check_indptr(name: str, indptr: Tensor) -> None:
    check_dtype(name, indptr, INDEX_DTYPES)
    if indptr.ndim != 1 or len(indptr) < 2:
        raise ValueError(f"{name} must be [B + 1] with B at least 1, got {list(indptr.shape)}")


def host_indptr(name: str, indptr: Tensor) -> list[int]:
    """The values of an indptr on the host, which waits for the device; they must ascend."""
    ends = indptr.tolist()
    if any(stop < start for start, stop in pairwise(ends)):
        raise ValueError(f"{name} must ascend, got {_brief(ends)}")
    return ends


def num_bytes(num_bits: int) -> int:
    """Bytes of a request of ``num_bits`` bits."""
    return q_bytes(num_bits)


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:16]))}, ...]"


def _check_flags(x: Tensor, bitorder: str) -> None:
    if x.ndim != 1:
        raise ValueError(f"x must be [n], got {list(x.shape)}")
    if bitorder not in ("big", "little"):
        raise ValueError(f"bitorder must be 'big' or 'little', got {bitorder!r}")


def _pack(flags: Tensor, size: int, bitorder: str) -> Tensor:
    """Pack bool ``[n]`` into uint8 ``[size]``."""
    if bitorder == "big":
        flags = torch.nn.functional.pad(flags, (0, size * 8 - len(flags)))
        flags = flags.view(size, 8).flip(-1).flatten()
    return pack_bits(flags, size)


def _pack_equal(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack bool ``[B, ...]``, each batch item a request."""
    flags = mask.flatten(1)
    size = num_bytes(flags.shape[1])
    indptr = torch.arange(len(mask) + 1, dtype=torch.int32, device=mask.device) * size
    return pack_bits(flags, size).flatten(), indptr


def _unpack(name: str, packed: Tensor, indptr: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first bits of each request: bool ``[B, *shape]``."""
    batch, count = len(indptr) - 1, math.prod(shape)
    what = f"{batch} requests of {' x '.join(map(str, shape))} bits"
    check_segments(name, packed, indptr, batch, batch * num_bytes(count), what, packed.device)
    offset = torch.arange(num_bytes(count), device=packed.device)
    index = indptr[:-1, None].long() + offset
    read = packed.index_select(0, index.flatten()).view(index.shape)
    return unpack_bits(read, count).unflatten(-1, shape)
