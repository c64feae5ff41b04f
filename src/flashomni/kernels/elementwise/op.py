"""What lies between the products, one pass over memory each: definitions in torch.

Norm and modulation, gate and residual, norm and RoPE, the terms of a forecast and their sum. On a
GPU with Triton the kernels of ``portable`` run instead: they compute in fp32 and round
once, where the definitions round after every operation, as the stock models do.

Letters in shapes: B batch, R rows (tokens), K features, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from flashomni.kernels.common.rope import Rope, apply_rope, rms_norm

MAX_TERMS = 4  # of a forecast: order 3


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, the norm without weights of its own.

    Args:
        x: ``[B, R, K]``.
        scale: ``[B, K]``.
        shift: ``[B, K]``.
        eps: epsilon of the norm.
    """
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.modulated_norm(x, scale, shift, eps)
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y`` for ``x`` and ``y`` ``[B, R, K]`` and ``gate`` ``[B, K]``."""
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.gated_residual(x, y, gate)
    return x + gate[:, None] * y


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual`, and :func:`modulated_norm` of it."""
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.gated_residual_norm(x, y, gate, scale, shift, eps)
    x = gated_residual(x, y, gate)
    return x, modulated_norm(x, scale, shift, eps)


def norm_rope_(q: Tensor, weight: Tensor | None, eps: float | None, rope: Rope | None) -> None:
    """RMSNorm over head_dim and RoPE (neighbours are a pair), in place.

    Args:
        q: ``[B, R, H, D]``.
        weight: ``[D]`` or ``None``.
        eps: epsilon of the norm; ``None`` leaves the norm out.
        rope: ``(cos, sin)`` each fp32 ``[R, D / 2]``, or ``None``.
    """
    if eps is None and rope is None:
        return
    kernels = _kernels(q)
    if kernels is not None:
        kernels.norm_rope_(q, weight, eps, rope)
        return
    new = q if eps is None else rms_norm(q, weight, eps)
    q.copy_(new if rope is None else apply_rope(new, *rope))


def differences(
    value: Tensor, minus: Tensor | None, old: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """A value and its backward differences per step: ``F_0 = value - minus``, ``F_1``, ...

    Args:
        value: any shape.
        minus: what to subtract from it, or ``None``.
        old: the terms ``F_0 ..`` of the value ``steps`` steps ago, up to three.
        steps: distance in steps.

    Returns:
        ``len(old) + 1`` new tensors in the dtype of ``value``.
    """
    kernels = _kernels(value)
    if kernels is not None:
        return kernels.differences(value, minus, old, steps)
    terms = [value.clone() if minus is None else value - minus]
    for term in old:
        terms.append(((terms[-1].float() - term.float()) / steps).to(value.dtype))
    return terms


def weighted_sum(
    terms: Sequence[Tensor], coefficients: Tensor, base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``base + sum_i coefficients[i] * terms[i]`` in fp32, then in ``dtype``.

    Args:
        terms: up to four tensors of one shape.
        coefficients: fp32, at least as many.
        base: a tensor of that shape, or ``None``.
        dtype: of the result.
    """
    kernels = _kernels(terms[0])
    if kernels is not None:
        return kernels.weighted_sum(terms, coefficients, base, dtype)
    return sum_of_terms(terms, coefficients, base).to(dtype)


def sum_of_terms(terms: Sequence[Tensor], coefficients: Tensor, base: Tensor | None) -> Tensor:
    """The definition of :func:`weighted_sum`, in fp32, on every device."""
    total = torch.zeros((), device=coefficients.device) if base is None else base.float()
    for weight, term in zip(coefficients, terms, strict=False):
        total = total + weight * term.float()
    return total


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels, if ``x`` is on a GPU and Triton is there."""
    if not x.is_cuda:
        return None
    try:
        from flashomni.kernels.elementwise import portable
    except ImportError:
        return None
    return portable
