"""What stands in for the forward of one module, and is taken off again without a trace."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class InsteadOfForward:
    """Stands in for the ``forward`` of one module until it is taken off.

    In front of diffusers' hooks that are on the module, behind accelerate's.

    Args:
        module: gets it at once.
        inside: behind diffusers' hooks too: what they do happens before and after.
    """

    def __init__(self, module: nn.Module, inside: bool = False) -> None:
        self.module, self._inside = module, inside
        self.put_on()

    def put_on(self) -> None:
        """Into the module, in front of what is there."""
        self.active = True
        holder, slot = innermost(self.module) if self._inside else _outermost(self.module)
        self.before = holder.get(slot)
        self.original: Callable[..., Any] = self.before or getattr(self.module, slot)
        self.__signature__ = inspect.signature(self.original)
        holder[slot] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def take_off(self) -> None:
        """Restore what was there; what was put on top of it since goes on calling the original."""
        self.active = False
        for holder, slot in places(self.module):
            if holder.get(slot) is not self:
                continue
            if self.before is None and holder is self.module.__dict__ and slot == "forward":
                del holder[slot]
            else:
                holder[slot] = self.before or self.original

    def rise(self) -> None:
        """Be in front of hooks that were put on since, if that matters: a call begins."""

    def rise_after(self) -> None:
        """The same behind a call, for the model: what it runs was looked up before it begins."""

    def __deepcopy__(self, memo: dict) -> Any:
        """A copy of the module has its class's own forward."""
        return stock_forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return stock_forward, (self.module,)


def stock_forward(module: nn.Module) -> Any:
    """The forward of a module's class."""
    return types.MethodType(type(module).forward, module)


def places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a forward of a module may be: in front of all hooks, and behind each kind of them."""
    own = module.__dict__
    behind = getattr(own.get("_diffusers_hook"), "_fn_refs", ())
    return [
        (own, "forward"), (own, "_old_forward"), *((each.__dict__, "forward") for each in behind)
    ]  # fmt: skip


def innermost(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Who holds the forward behind all hooks: the class's own, or one that stands in for it."""
    stock = stock_forward(module)
    for holder, slot in reversed(places(module)):
        forward = holder.get(slot)
        if forward == stock or isinstance(forward, InsteadOfForward):
            return holder, slot
    return _outermost(module)


def _outermost(module: nn.Module) -> tuple[dict[str, Any], str]:
    return module.__dict__, "_old_forward" if hasattr(module, "_hf_hook") else "forward"
