"""What stands in for the forward of one module, and is taken off again without a trace."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn


class InsteadOfForward:
    """Stands in for the ``forward`` of one module, in its ``__dict__``, until it is taken off.

    Args:
        module: gets it at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.active = module, True
        self.slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.before = module.__dict__.get(self.slot)
        self.original: Callable[..., Any] = getattr(module, self.slot)
        self.__signature__ = inspect.signature(self.original)
        module.__dict__[self.slot] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def take_off(self) -> None:
        """Restore what was there; what was put on top of it since goes on calling the original."""
        self.active = False
        for slot in ("forward", "_old_forward"):
            if self.module.__dict__.get(slot) is self:
                if self.before is None and slot == "forward":
                    del self.module.__dict__[slot]
                else:
                    self.module.__dict__[slot] = self.before or self.original

    def __deepcopy__(self, memo: dict) -> Any:
        """A copy of the module has its class's own forward."""
        return stock_forward(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return stock_forward, (self.module,)


def stock_forward(module: nn.Module) -> Any:
    """The forward of a module's class."""
    return types.MethodType(type(module).forward, module)
