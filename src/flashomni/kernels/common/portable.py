"""What the portable Triton backends share: where they run, what they refuse, how they tile.

Plain Triton, no instruction of one vendor or generation: NVIDIA from sm_80 on and what else Triton
compiles for. With ``TRITON_INTERPRET=1`` the same kernels run, slowly, in Triton's interpreter on
the CPU; then they come below every real backend and run only if asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.kernels.common import configs, tuned
from flashomni.kernels.common.configs import DEFAULT, Config
from flashomni.triton_host import DEVICE, INTERPRETED, RANK, available, refuse_device

# Beside what is defined here.
__all__ = ["DEVICE", "INTERPRETED", "RANK", "available", "refuse_device"]

MAX_HEAD_DIM = 256


def refuse_head_dim(head_dim: int) -> list[str]:
    if head_dim <= MAX_HEAD_DIM:
        return []
    return [f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}"]


def refuse_strides(**tensors: Tensor | None) -> list[str]:
    """Kernels step over the last dim by one element."""
    return [
        f"{name}: the last dim must be contiguous, got stride {tensor.stride(-1)}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1
    ]


def config(op: str, tensor: Tensor, head_dim: int) -> Config:
    """How ``op`` tiles on this device, for head_dim (padded to a power of two) and element size."""
    table, size = f"{op}/portable", (padded(head_dim), tensor.element_size())
    if INTERPRETED:
        return configs.tiles(table, (DEFAULT,), *size)
    return tuned.tiles(table, tensor.device, *size)


def padded(head_dim: int) -> int:
    """The tile dim that holds ``head_dim``: a power of two, as Triton wants it."""
    return max(16, triton.next_power_of_2(head_dim))


def dividing(tile: int, block: int) -> int:
    """The largest power of two up to ``tile`` that divides ``block``."""
    return min(tile, block & -block)


def precision(dtype: torch.dtype) -> str:
    """fp32 products are IEEE: tf32 has an error far above that of torch's fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def bounded(index, count):
    """``index`` moved into ``[0, count)``: a load needs no mask where the result is not stored."""
    return tl.maximum(tl.minimum(index, count - 1), 0)
