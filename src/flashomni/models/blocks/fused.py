"""What blocks do around attention, in few passes: modulation, residual, MLP, projections in place.

A module is taken apart only where it is exactly what it seems: of the known class, plain, unhooked.
Every other module is called. ``backend`` is the run's (``run.backend``): nobody may forget it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine.linear import is_hooked, is_rms_norm, is_stock, norm_eps, plain_weights
from flashomni.kernels.elementwise.op import gated_residual, gated_residual_norm, modulated_norm

ADAPTIVE = ("AdaLayerNormZero", "AdaLayerNormZeroSingle")


def adaptive_norm(norm: Any, x: Tensor, emb: Tensor, *, backend: str | None) -> tuple[Tensor, ...]:
    """``norm(x, emb=emb)`` for diffusers' AdaLayerNormZero and AdaLayerNormZeroSingle.

    Args:
        norm: makes shift, scale and gates of ``emb``.
        x: ``[B, R, K]``.
        emb: ``[B, K]``.
        backend: take exactly this one; ``None`` takes the best that accepts.

    Returns:
        The modulated norm of ``x``, then gate, and shift, scale and gate of the MLP if there are.
    """
    known = is_stock(norm, *ADAPTIVE) and getattr(norm, "emb", None) is None
    if not known or is_hooked(norm) or not _is_bare(norm.norm) or emb.ndim != 2:
        return norm(x, emb=emb)
    parts = norm.linear(norm.silu(emb)).chunk(norm.linear.out_features // x.shape[-1], dim=1)
    x = modulated_norm(x, parts[1], parts[0], norm.norm.eps, backend=backend)
    return x, *parts[2:]


def modulate(
    norm: Any, x: Tensor, scale: Tensor, shift: Tensor | None, *, backend: str | None
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``.

    Args:
        norm: a LayerNorm without weights, or an RMSNorm; any other module is called.
        x: ``[B, R, K]``.
        scale: ``[B, K]``.
        shift: ``[B, K]``, or ``None`` for none.
        backend: take exactly this one; ``None`` takes the best that accepts.
    """
    if _is_bare(norm):
        return modulated_norm(x, scale, shift, norm.eps, backend=backend)
    if _is_rms(norm, x):
        eps = norm_eps(norm, x.dtype)
        return modulated_norm(x, scale, shift, eps, norm.weight, "rms", backend=backend)
    x = norm(x) * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


def add_normed(x: Tensor, y: Tensor, gate: Tensor, norm: Any, *, backend: str | None) -> Tensor:
    """``x + gate * norm(y)``.

    Args:
        x: ``[B, R, K]``.
        y: ``[B, R, K]``.
        gate: ``[B, K]``.
        norm: an RMSNorm; any other module is called.
        backend: take exactly this one; ``None`` takes the best that accepts.
    """
    if not _is_rms(norm, x):
        return gated_residual(x, norm(y), gate, backend=backend)
    return gated_residual(x, y, gate, norm_eps(norm, x.dtype), norm.weight, backend=backend)


def residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    norm: Any,
    scale: Tensor,
    shift: Tensor,
    *,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``x + gate * y``, and the norm of that, modulated.

    Args:
        x: ``[B, R, K]``.
        y: ``[B, R, K]``.
        gate: ``[B, K]``.
        norm: a LayerNorm without weights; any other module is called.
        scale: ``[B, K]``.
        shift: ``[B, K]``.
        backend: take exactly this one; ``None`` takes the best that accepts.
    """
    if _is_bare(norm):
        return gated_residual_norm(x, y, gate, scale, shift, norm.eps, backend=backend)
    x = gated_residual(x, y, gate, backend=backend)
    return x, modulate(norm, x, scale, shift, backend=backend)


def _is_bare(norm: Any) -> bool:
    """Whether a norm is a LayerNorm over the last dim without weights and without hooks."""
    bare = type(norm) is nn.LayerNorm and norm.weight is None and norm.bias is None
    return bare and len(norm.normalized_shape) == 1 and not is_hooked(norm)


def _is_rms(norm: Any, x: Tensor) -> bool:
    """Whether a norm is a stock RMSNorm over the last dim, in the dtype of the tokens."""
    if norm is None or not is_rms_norm(norm, x.shape[-1]):
        return False
    return norm.weight is None or norm.weight.dtype == x.dtype


def mlp(module: Any, x: Tensor) -> Tensor:
    """``module(x)`` for diffusers' FeedForward.

    Args:
        module: a FeedForward.
        x: ``[B, R, K]``.
    """
    net = getattr(module, "net", None)
    if not is_stock(module, "FeedForward") or net is None or is_hooked(module):
        return module(x)
    first, *rest = net
    is_tanh = is_stock(first, "GELU") and getattr(first, "approximate", "") == "tanh"
    if not is_tanh or is_hooked(first):
        return module(x)
    x = gelu_linear(first.proj, x)
    for layer in rest:
        x = layer(x)
    return x


def gelu_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """``gelu(linear(x))``, tanh form; on a GPU the product applies it before it is written."""
    weights = plain_weights(linear, x) if x.is_cuda else None
    if weights is None or weights.bias is None:
        return nn.functional.gelu(linear(x), approximate="tanh")
    out = torch._addmm_activation(weights.bias, x.flatten(0, 1), weights.weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:2])
