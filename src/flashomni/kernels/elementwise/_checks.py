"""Argument checks of the elementwise ops: a glance at metadata, and words only where it fails.

These ops run several times a block, so a right call pays less than a microsecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.kernels.common.checks import (
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
)
from flashomni.kernels.common.rope import ROPE_LAYOUTS, Rope

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_TERMS = 4  # of a forecast: order 3


def check_streams(
    x: Any,
    rows: dict[str, Any],
    vectors: dict[str, Any],
    eps: Any = 0.0,
    weight: Any = None,
) -> None:
    """``x`` and ``rows`` are ``[B, R, K]``, ``vectors`` ``[B, K]``, all floats on one device.

    ``weight`` is ``[K]`` in the dtype of ``x``, or ``None``.

    Raises:
        ValueError: one is not; the message names it.
    """
    try:
        shape, device = x.shape, x.device
        fits = len(shape) == 3 and x.dtype in FLOATS and type(eps) is float and eps >= 0
        pair = (shape[0], shape[-1])
        for tensor in rows.values():
            fits &= tensor.shape == shape and tensor.device == device and tensor.dtype in FLOATS
        for tensor in vectors.values():
            fits &= tensor.shape == pair and tensor.device == device and tensor.dtype in FLOATS
        if weight is not None:
            fits &= weight.shape == (shape[-1],) and weight.device == device
            fits &= weight.dtype == x.dtype
    except (AttributeError, IndexError):
        fits = False
    if fits:
        return
    _check_float("x", x)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, R, K], got {list(x.shape)}")
    for name, tensor in rows.items():
        _check_like(name, tensor, x.shape, x.device)
    for name, tensor in vectors.items():
        _check_like(name, tensor, (x.shape[0], x.shape[2]), x.device)
    if weight is not None:
        _check_like("weight", weight, (x.shape[2],), x.device)
        check_dtype("weight", weight, (x.dtype,))
    check_number("eps", eps, least=0.0)


def check_norm_rope(q: Any, weight: Any, eps: Any, rope: Rope | None, layout: str) -> None:
    """``q [B, R, H, D]``, ``weight [D]``, tables of RoPE fp32 ``[R, D / 2]`` or by item and head.

    Raises:
        ValueError: one is not; the message names it.
    """
    try:
        (batch, rows, num_heads, head_dim), device = q.shape, q.device
        fits = q.dtype in FLOATS and layout in ROPE_LAYOUTS
        fits &= weight is None if eps is None else type(eps) is float and eps >= 0
        if weight is not None:
            fits &= weight.shape == (head_dim,) and weight.device == device
            fits &= weight.dtype in FLOATS
        if rope is not None:
            cos, sin = rope
            fits &= head_dim % 2 == 0 and cos.device == sin.device == device
            shape = cos.shape
            fits &= shape == sin.shape and shape[-1] == head_dim // 2
            if len(shape) == 2:
                fits &= shape[0] == rows
            else:
                fits &= shape[0] in (1, batch) and shape[1] == rows and shape[2] in (1, num_heads)
            fits &= cos.dtype is sin.dtype is torch.float32
    except (AttributeError, TypeError, ValueError):
        fits = False
    if fits:
        return
    _check_float("q", q)
    if q.ndim != 4:
        raise ValueError(f"q must be [B, R, H, D], got {list(q.shape)}")
    if weight is not None:
        _check_like("weight", weight, q.shape[3:], q.device)
        if eps is None:
            raise ValueError("weight needs eps, got None")
    if eps is not None:
        check_number("eps", eps, least=0.0)
    if layout not in ROPE_LAYOUTS:
        raise ValueError(f"rope_layout must be one of {', '.join(ROPE_LAYOUTS)}, got {layout!r}")
    if rope is None:
        return
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise ValueError(f"rope must be a pair (cos, sin), got {type(rope).__name__}")
    if q.shape[3] % 2:
        raise ValueError(f"rope needs an even head_dim, got {q.shape[3]}")
    cos = rope[0]
    check_tensor("rope cos", cos)
    own = cos.ndim == 4  # tables of items or heads
    items, heads = (1 if own and cos.shape[dim] == 1 else q.shape[dim] for dim in (0, 2))
    sizes = (items, q.shape[1], heads) if own else (q.shape[1],)
    for name, table in zip(("rope cos", "rope sin"), rope, strict=True):
        check_shape(name, table, (*sizes, q.shape[3] // 2))
        check_dtype(name, table, (torch.float32,))
        check_device(name, table, q.device)


def check_differences(
    value: Any, minus: Any, old: Sequence[Any], gaps: Sequence[Any], dtype: torch.dtype | None
) -> None:
    """Terms of the shape of ``value``, at most three, and as many gaps.

    Raises:
        ValueError: one is not; the message names it.
    """
    _check_float("value", value)
    if dtype is not None:
        _check_dtype_name(dtype)
    if minus is not None:
        _check_like("minus", minus, value.shape, value.device)
    _check_count("old", old, 0, MAX_TERMS - 1)
    for index, term in enumerate(old):
        _check_like(f"old[{index}]", term, value.shape, value.device)
    if len(gaps) != len(old):
        raise ValueError(f"gaps must be as many as old, {len(old)}, got {len(gaps)}")
    for index, gap in enumerate(gaps):
        check_number(f"gaps[{index}]", gap)
        if gap == 0:
            raise ValueError(f"gaps[{index}] must not be 0, got {gap}")


def check_weighted_sum(
    terms: Sequence[Any], coefficients: Any, base: Any, dtype: torch.dtype
) -> None:
    """One to four terms of one shape, and at least as many coefficients in fp32.

    Raises:
        ValueError: one is not; the message names it.
    """
    _check_count("terms", terms, 1, MAX_TERMS)
    _check_float("terms[0]", terms[0])
    shape, device = terms[0].shape, terms[0].device
    for index, term in enumerate(terms[1:], 1):
        _check_like(f"terms[{index}]", term, shape, device)
    check_dtype("coefficients", coefficients, (torch.float32,))
    if coefficients.ndim != 1 or coefficients.shape[0] < len(terms):
        raise ValueError(
            f"coefficients must be [T], T at least {len(terms)}, got {list(coefficients.shape)}"
        )
    check_device("coefficients", coefficients, device)
    if base is not None:
        _check_like("base", base, shape, device)
    _check_dtype_name(dtype)


def _check_float(name: str, tensor: Any) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        check_dtype(name, tensor, FLOATS)


def _check_like(name: str, tensor: Any, shape: Sequence[int], device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.shape != shape:
        _check_float(name, tensor)
        check_shape(name, tensor, shape)
    check_device(name, tensor, device)


def _check_count(name: str, tensors: Any, least: int, most: int) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise ValueError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
    if not least <= len(tensors) <= most:
        raise ValueError(f"{name} must hold {least} to {most} tensors, got {len(tensors)}")


def _check_dtype_name(dtype: Any) -> None:
    if dtype not in FLOATS:
        allowed = " or ".join(str(one).removeprefix("torch.") for one in FLOATS)
        raise ValueError(f"dtype must be {allowed}, got {dtype}")
