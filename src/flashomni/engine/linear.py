"""When a projection's weight may be read directly, and what to do when it may not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """A dense weight ``[N, K]`` and its bias ``[N]`` or ``None``."""

    weight: Tensor
    bias: Tensor | None


def why_not_plain(module: nn.Module, x: Tensor) -> str | None:
    """Why ``module(x)`` may differ from a product with ``module.weight``; ``None`` if it may not.

    A live LoRA, a quantised or fp8-at-rest weight, offloading and hooks all give a reason: reading
    the weight would lose or break them. Such a module is called, never taken apart.
    """
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain Linear"
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or hasattr(module, "_hf_hook")
        or hasattr(module, "_diffusers_hook")
    )
    if hooked:
        return "it carries a hook"
    for name, tensor in (("weight", module.weight), ("bias", module.bias)):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            return f"its {name} is a {type(tensor.data).__name__}, not a dense tensor"
        if tensor.dtype != x.dtype:
            return f"its {name} is {tensor.dtype}, the input {x.dtype}"
        if tensor.device != x.device:
            return f"its {name} is on {tensor.device}, the input on {x.device}"
    return None


def plain_weights(module: nn.Module, x: Tensor) -> Weights | None:
    """The weights of a plain, unhooked Linear; ``None`` for everything else."""
    if why_not_plain(module, x) is not None:
        return None
    return Weights(module.weight, module.bias)  # type: ignore[arg-type]  # checked above


def linear_flops(module: nn.Module, rows: int) -> int:
    """Multiply-adds times 2 of every Linear below ``module``, for ``rows`` tokens each."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(2 * rows * layer.in_features * layer.out_features for layer in layers)


def joined(o: Tensor, always: Tensor | None) -> Tensor:
    """Heads ``[B, R, H, D]`` and always-on features as the input of the whole projection."""
    heads = o.flatten(2)
    return heads if always is None else torch.cat([heads, always], dim=-1)
