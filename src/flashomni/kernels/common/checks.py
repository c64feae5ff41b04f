"""Argument checks shared by the ops: an error names the argument, what it got and takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashomni.kernels.common.overlap import overlap, overlaps_itself

float_dtypes = (torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {_kind(tensor)}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {names}, got {got}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{name} must be an int, got {_kind(value)}")


def check_positive(name: str, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")


def check_number(name: str, value: object, least: float = -math.inf) -> None:
    """Refuse what is no finite number, or is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{name} must be a number, got {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def check_no_grad(**tensors: Tensor | None) -> None:
    """No op has a backward: what would lose a gradient is refused."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, but the ops have no backward: call them under "
                "torch.no_grad(), or detach it"
            )


def check_written(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Refuse outputs that overlap themselves, each other or an input.

    Under ``torch.compile`` only the first is asked: there an op writes into tensors of its own.
    """
    for name, out in written.items():
        if out is not None and overlaps_itself(out):
            raise ValueError(
                f"{name} must not overlap itself, got shape {list(out.shape)} with strides "
                f"{list(out.stride())}"
            )
    if torch.compiler.is_compiling():
        return
    outputs = [(name, out) for name, out in written.items() if out is not None]
    for index, (name, out) in enumerate(outputs):
        storage = out.untyped_storage()
        start = storage.data_ptr()
        stop = start + storage.nbytes()
        for other, tensor in (*read.items(), *outputs[:index]):
            # What begins outside of the storage of `out` cannot share an element with it.
            if tensor is not None and start <= tensor.data_ptr() < stop and overlap(out, tensor):
                raise ValueError(f"{name} must not overlap {other}, got memory that both use")


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
