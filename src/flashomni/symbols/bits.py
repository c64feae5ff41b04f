"""Masks as packed bits: little endian, eight to a byte, rows of S_s in whole 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BYTES = 4


def row_bytes(num_kv_blocks: int) -> int:
    """Bytes of one S_s row: whole 32-bit words."""
    return -(-num_kv_blocks // (8 * WORD_BYTES)) * WORD_BYTES


def q_bytes(num_q_blocks: int) -> int:
    """Bytes of one S_c row."""
    return -(-num_q_blocks // 8)


def pack_bits(mask: Tensor, num_bytes: int) -> Tensor:
    """Pack the last dim of a bool tensor, little endian, into ``num_bytes`` uint8."""
    padded = torch.nn.functional.pad(mask, (0, num_bytes * 8 - mask.shape[-1]))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (num_bytes, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` bits of the last dim, as bool."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] >> shifts & 1).flatten(-2)[..., :count].bool()


def in_range(count: int, span: tuple[int, int], device: torch.device) -> Tensor:
    """True at the indices of ``span``: bool ``[count]``."""
    index = torch.arange(count, device=device)
    return (index >= span[0]) & (index < span[1])
