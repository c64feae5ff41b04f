"""When a projection's weight may be read directly, and what to do when it may not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Weights(NamedTuple):
    """A dense weight ``[N, K]`` and its bias ``[N]`` or ``None``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Part:
    """Some output features of a Linear that holds several projections side by side.

    Made by :func:`split_linear`, for one input; it stands wherever a Linear may.

    Args:
        whole: the Linear.
        start: its first feature.
        stop: the one behind its last.
        value: what it gives for that input, where the whole had to be called.
    """

    whole: nn.Module
    start: int
    stop: int
    value: Tensor | None

    @property
    def in_features(self) -> int:
        return int(self.whole.in_features)  # type: ignore[arg-type]  # all Linears have it

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, R, stop - start]`` of ``x [B, R, K]``."""
        if self.value is not None:
            return self.value
        weights = plain_weights(self, x)
        assert weights is not None, "split for another input"
        return nn.functional.linear(x, *weights)


Projection = nn.Module | Part


def split_linear(linear: nn.Module, x: Tensor, sizes: Sequence[int]) -> list[Part]:
    """The projections that a Linear holds side by side: slices of its weight where that is read.

    A Linear that has to be called is called here, once, for all of them.

    Args:
        linear: ``[N, K]``.
        x: ``[B, R, K]``, what they will be asked for.
        sizes: features of each, N together.

    Raises:
        ValueError: ``sizes`` are not N together.
    """
    if sum(sizes) != linear.out_features:
        raise ValueError(f"sizes must sum to {linear.out_features}, got {list(sizes)}")
    plain = why_not_plain(linear, x) is None
    values = [None] * len(sizes) if plain else linear(x).split(list(sizes), dim=-1)
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        Part(linear, stop - size, stop, value)
        for size, stop, value in zip(sizes, stops, values, strict=True)
    ]


def why_not_plain(module: Projection, x: Tensor) -> str | None:
    """Why ``module(x)`` may differ from a product with ``module.weight``; ``None`` if it may not.

    A live LoRA, a quantised or fp8-at-rest weight, offloading and hooks all give a reason: reading
    the weight would lose or break them. Such a module is called, never taken apart.
    """
    if isinstance(module, Part):
        return why_not_plain(module.whole, x)
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain Linear"
    if is_hooked(module):
        return "it carries a hook"
    parameters = module._parameters
    for name in ("weight", "bias"):
        tensor = parameters[name] if name in parameters else getattr(module, name)
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or type(tensor.data) is not Tensor:
            return f"its {name} is a {type(tensor.data).__name__}, not a dense tensor"
        if tensor.dtype != x.dtype:
            return f"its {name} is {tensor.dtype}, the input {x.dtype}"
        if tensor.device != x.device:
            return f"its {name} is on {tensor.device}, the input on {x.device}"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward."""
    # Asked several times a block: a module's own lookup of what is not there costs microseconds.
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or "_hf_hook" in own
        or "_diffusers_hook" in own
    )


def is_stock(module: Any, *names: str) -> bool:
    """Whether a module is exactly what its name says: torch's or diffusers' own class, unchanged.

    A class of the same name from elsewhere, a subclass, and a class whose forward somebody has
    replaced are not.

    Args:
        names: of the classes that are meant.
    """
    cls: Any = type(module)
    if cls.__name__ not in names:
        return False
    return _is_own(cls, cls.forward if isinstance(module, nn.Module) else cls.__call__)


@functools.lru_cache(1024)
def _is_own(cls: type, called: Any) -> bool:
    """Whether a class and what runs when it is called come from torch or diffusers."""
    modules = (cls.__module__, getattr(called, "__module__", None) or "")
    return all(module.partition(".")[0] in ("torch", "diffusers") for module in modules)


def is_rms_norm(norm: nn.Module | None, head_dim: int) -> bool:
    """Whether a norm can be fused: ``None``, or a plain RMSNorm over ``head_dim`` without bias.

    One over all heads is none, nor is a class that only has the name.
    """
    if norm is None:
        return True
    if not is_stock(norm, "RMSNorm") or is_hooked(norm):
        return False
    return getattr(norm, "bias", None) is None and _normed_shape(norm) == (head_dim,)


def norm_heads(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` of heads ``[B, R, H, D]``, whether it spans one head or all of them."""
    shape = _normed_shape(norm)
    if shape == (x.shape[2] * x.shape[3],) and shape != x.shape[3:]:
        return norm(x.flatten(2)).view(x.shape)
    return norm(x)


def _normed_shape(norm: Any) -> tuple[int, ...] | None:
    """The last dims over which a norm runs, where it says so or its weight shows it."""
    for shape in (getattr(norm, "normalized_shape", None), getattr(norm, "dim", None)):
        if shape is not None:
            return (shape,) if isinstance(shape, int) else tuple(shape)
    weight = getattr(norm, "weight", None)
    return None if weight is None else tuple(weight.shape)


def plain_weights(module: Projection, x: Tensor) -> Weights | None:
    """The weights of a plain, unhooked Linear or of a part of it; ``None`` for everything else."""
    if why_not_plain(module, x) is not None:
        return None
    if isinstance(module, Part):
        rows = slice(module.start, module.stop)
        weight, bias = module.whole.weight, module.whole.bias
        return Weights(weight[rows], None if bias is None else bias[rows])  # type: ignore[index]
    return Weights(module.weight, module.bias)  # type: ignore[arg-type]  # checked above


def linear_flops(module: Projection, rows: int) -> int:
    """Multiply-adds times 2 of every Linear below ``module``, for ``rows`` tokens each."""
    if isinstance(module, (nn.Linear, Part)):
        return 2 * rows * module.in_features * module.out_features
    layers = (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(2 * rows * layer.in_features * layer.out_features for layer in layers)


def project_into(linear: Projection, x: Tensor, out: Tensor) -> None:
    """``out[:] = linear(x)``, without a copy where the weight may be read directly.

    Args:
        linear: ``[N, K]``.
        x: ``[B, R, K]``.
        out: ``[B, R, ...]`` of N features, a run of tokens of a longer sequence maybe.
    """
    weights = plain_weights(linear, x)
    features = out.flatten(2)
    if weights is None or not x.is_cuda or features.data_ptr() != out.data_ptr():
        out.copy_(linear(x).view(out.shape))
        return
    for rows, result in zip(x, features, strict=True):
        if weights.bias is None:
            torch.mm(rows, weights.weight.t(), out=result)
        else:
            torch.addmm(weights.bias, rows, weights.weight.t(), out=result)


def project_joined(linear: nn.Module, o: Tensor, always: Tensor | None) -> Tensor:
    """The whole projection of heads ``[B, R, H, D]`` and always-on features ``[B, R, E]``."""
    heads = o.flatten(2)
    if always is None:
        return linear(heads)
    weights = plain_weights(linear, o) if o.is_cuda else None
    if weights is None:
        return linear(torch.cat([heads, always], dim=-1))
    # Two products instead of a copy of both inputs, which are the widest tensors of a block.
    own, rest = weights.weight.split([heads.shape[-1], always.shape[-1]], dim=1)
    out = torch.nn.functional.linear(always, rest, weights.bias)
    out.flatten(0, 1).addmm_(heads.flatten(0, 1), own.t())
    return out


def join_tokens(first: Tensor, second: Tensor) -> Tensor:
    """``cat`` along the tokens; a view where the two lie one behind the other already."""
    adjacent = (
        first.dtype == second.dtype
        and first.stride() == second.stride()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + first.shape[1] * first.stride(1)
    )
    if not adjacent:
        return torch.cat([first, second], dim=1)
    shape = (first.shape[0], first.shape[1] + second.shape[1], *first.shape[2:])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def norm_eps(norm: nn.Module, dtype: torch.dtype) -> float:
    """What a norm adds under the root: where it says nothing, what torch takes of the dtype."""
    eps = norm.eps
    return torch.finfo(dtype).eps if eps is None else float(eps)  # type: ignore[arg-type]
