"""Arguments of a model by name; and, as outputs, as a shape and a list of tensors, and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def by_name(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a model's call by name."""
    if not args:
        return kwargs
    return {**dict(zip(_names(type(model).forward), args, strict=False)), **kwargs}


@functools.lru_cache(64)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Parameters of a class's forward, which cost tens of microseconds to find."""
    return tuple(inspect.signature(forward).parameters)[1:]


def shape_of(value: Any, leaves: list[Tensor]) -> Hashable:
    """Arguments without their tensors' values; the tensors are added to ``leaves``."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return Tensor, value.shape, value.stride(), value.dtype, value.device, type(value)
    if isinstance(value, dict):
        return dict, tuple((key, shape_of(item, leaves)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(shape_of(item, leaves) for item in value)
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return type(value), value
    return "unknown", type(value)


def refuse_inputs(shape: Any, leaves: list[Tensor], device: torch.device | None) -> str:
    """Why a call with such arguments cannot be recorded; empty if it can."""
    for leaf in leaves:
        if type(leaf) not in (Tensor, nn.Parameter):
            return f"an argument of the model is a {type(leaf).__name__}"
        if leaf.device != device:
            return f"an argument of the model lies on {leaf.device}"
    unknown = _find_unknown(shape)
    return "" if unknown is None else f"an argument of the model is a {unknown.__name__}"


def _find_unknown(shape: Any) -> type | None:
    if not isinstance(shape, tuple):
        return None
    if len(shape) == 2 and shape[0] == "unknown" and isinstance(shape[1], type):
        return shape[1]
    return next((found for found in map(_find_unknown, shape) if found is not None), None)


def filled(value: Any, tensors: Any) -> Any:
    """Arguments with other tensors, in the order of :func:`shape_of`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: filled(item, tensors) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [filled(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def cloned(value: Any) -> Any:
    """An output with tensors of its own: the next replay writes to the recorded ones."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return type(value)(**{key: cloned(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return type(value)(cloned(item) for item in value)
    return value
