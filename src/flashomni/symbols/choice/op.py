"""Block means and choices on rows of masses: contracts, and definitions in torch.

Three ops; ``reference`` and ``cpu`` are the definitions, ``portable`` chooses the same in Triton
and serves ``sm90`` too. Choices are packed bits (see :mod:`flashomni.symbols`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, register
from flashomni.symbols.bits import pack_bits


@dataclass(frozen=True)
class MeansCall:
    """What a backend of ``block_means`` gets; it returns a new tensor."""

    x: Tensor
    block: int
    length: Tensor | None
    unit: bool


@dataclass(frozen=True)
class HeavyCall:
    """What a backend of ``heavy_bits`` gets; it returns a new tensor. tau: fp32 scalar tensor."""

    mass: Tensor
    tau: Tensor
    num_bytes: int


@dataclass(frozen=True)
class HeaviestCall:
    """What a backend of ``heaviest_bits`` gets; it returns a new tensor."""

    mass: Tensor
    count: int
    num_bytes: int


def block_means(
    x: Tensor,
    block: int,
    length: Tensor | None = None,
    *,
    unit: bool = False,
    backend: str | None = None,
) -> Tensor:
    """:func:`pool` of ``x``; with ``unit``, of its tokens scaled to length 1."""
    return execute("block_means", MeansCall(x, block, length, unit), backend)


def self_similarity(
    x: Tensor, block: int, length: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Mean cosine over all pairs of tokens of a block: fp32 ``[B, H, blocks]``."""
    return block_means(x, block, length, unit=True, backend=backend).square().sum(-1)


def heavy_bits(
    mass: Tensor, tau: Tensor | float, num_bytes: int, *, backend: str | None = None
) -> Tensor:
    """All but :func:`low_mass`, packed: uint8 ``[..., num_bytes]``."""
    return execute("heavy_bits", HeavyCall(mass, _scalar(tau, mass), num_bytes), backend)


def heaviest_bits(
    mass: Tensor, count: int, num_bytes: int, *, backend: str | None = None
) -> Tensor:
    """:func:`heaviest`, packed: uint8 ``[..., num_bytes]``."""
    return execute("heaviest_bits", HeaviestCall(mass, count, num_bytes), backend)


def low_mass(mass: Tensor, tau: Tensor | float) -> Tensor:
    """The lightest entries of the last dim that together hold at most ``tau`` of its sum.

    An entry heavier than ``tau`` is never among them; of equal entries the first are the lightest.
    bool, shape of ``mass``, which must not be negative.
    """
    ordered, order = mass.sort(dim=-1, stable=True)
    prefix = ordered.cumsum(-1, dtype=torch.float64)
    low = prefix <= _scalar(tau, mass) * prefix[..., -1:]
    return torch.zeros_like(low).scatter(-1, order, low)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """The ``count`` heaviest entries of the last dim; of equal entries the first.

    bool, shape of ``mass``, which must not be negative.
    """
    order = mass.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :count], True)


def _scalar(tau: Tensor | float, like: Tensor) -> Tensor:
    """``tau`` as an fp32 scalar on the device, so that no way of choosing rounds it otherwise."""
    if isinstance(tau, Tensor):
        return tau.float()
    return torch.full((), tau, dtype=torch.float32, device=like.device)


def pool(x: Tensor, block: int, length: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each block, over the tokens that exist.

    Args:
        x: ``[B, S, H, D]``.
        block: tokens per block.
        length: optional int32 ``[B]``: tokens from there on are padding and are left out.

    Returns:
        fp32 ``[B, H, ceil(S / block), D]``; a block of padding alone is zero.
    """
    seqlen = x.shape[1]
    num_blocks = -(-seqlen // block)
    position = torch.arange(num_blocks * block, device=x.device).view(1, num_blocks, block)
    limit = seqlen if length is None else length.view(-1, 1, 1)
    valid = position < limit  # [1 | B, blocks, block]
    count = valid.sum(-1).clamp(min=1)[..., None, None]  # [1 | B, blocks, 1, 1]
    if length is not None:
        x = x * valid.flatten(1)[:, :seqlen, None, None].to(x.dtype)
    tail = num_blocks * block - seqlen
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x
    total = x.unflatten(1, (num_blocks, block)).sum(2, dtype=torch.float32)
    return (total / count).permute(0, 2, 1, 3)


declare("block_means", MeansCall, public="block_means")
declare("heavy_bits", HeavyCall, public="heavy_bits")
declare("heaviest_bits", HeaviestCall, public="heaviest_bits")


def _definition(op: str) -> Callable[[Callable], Callable]:
    """Register a definition as ``reference``, on every device, and as ``cpu``."""

    def refuses(call: Any) -> list[str]:
        device = (call.x if isinstance(call, MeansCall) else call.mass).device.type
        return [] if device == "cpu" else [f"tensors are on {device}, this backend is for cpu"]

    def keep(run: Callable) -> Callable:
        register(op, "cpu", rank=10, refuses=refuses, device="cpu")(run)
        return register(op, "reference", rank=0)(run)

    return keep


@_definition("block_means")
def _block_means(call: MeansCall) -> Tensor:
    x = torch.nn.functional.normalize(call.x.float(), dim=-1) if call.unit else call.x
    return pool(x, call.block, call.length)


@_definition("heavy_bits")
def _heavy_bits(call: HeavyCall) -> Tensor:
    return pack_bits(~low_mass(call.mass, call.tau), call.num_bytes)


@_definition("heaviest_bits")
def _heaviest_bits(call: HeaviestCall) -> Tensor:
    return pack_bits(heaviest(call.mass, call.count), call.num_bytes)
