"""Copies of what a branch remembers, without its tensors: the bookkeeping of a recorded call."""

from __future__ import annotations

from typing import Any

OWN = "flashomni.engine.state."


def mirror(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy in which every container and every object of this package's state is another.

    Tensors, symbols, numbers and whatever else belongs to others are shared. What is shared within
    ``value`` (a history of two spans) is shared within the copy.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    copy: Any
    if kind is dict:
        copy = memo[id(value)] = {}
        copy.update((key, mirror(item, memo)) for key, item in value.items())
    elif kind is list:
        copy = memo[id(value)] = []
        copy.extend(mirror(item, memo) for item in value)
    elif kind is tuple:
        copy = tuple(mirror(item, memo) for item in value)
    elif kind is set:
        copy = set(value)
    elif kind.__module__.startswith(OWN) and not _is_frozen(kind):
        copy = memo[id(value)] = object.__new__(kind)
        copy.__dict__.update((key, mirror(item, memo)) for key, item in vars(value).items())
    else:
        copy = value
    memo[id(value)] = copy
    return copy


def _is_frozen(kind: type) -> bool:
    """Whether objects of a class never change: a frozen dataclass."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen
