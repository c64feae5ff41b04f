"""Blocks whose weights diffusers' group offloading brings for each call, and takes away after it.

The hooks wrap a block's forward. A block that is not computed needs no weights, and on a small card
bringing them takes longer than computing: so the engine is in front of the hooks, decides, and
computes behind them. That it leaves blocks out is what the hooks do not expect: a group of several
blocks is brought by its first and taken away behind its last, and one that was fetched ahead would
stay. :func:`bring` and :func:`take_away` do what a block that was left out would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.models._hooks import hooks_of, is_wrapper
from flashomni.models._stand_in import InsteadOfForward

NAME = "group_offloading"


def group_of(module: nn.Module) -> Any:
    """diffusers' ModuleGroup that a module's hook moves; ``None`` where there is none."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(NAME)
    return None if hook is None else hook.group


def bring(block: nn.Module) -> None:
    """The weights of a block's group to where they compute, if they rest elsewhere."""
    group = group_of(block)
    if group is not None and _are_on(group, group.offload_device):
        group.onload_()
        if group.stream is not None:
            torch.cuda.current_stream(group.onload_device).wait_stream(group.stream)


def take_away(block: nn.Module, always: bool = False) -> None:
    """The weights of a block's group back to where they rest, if they do not.

    Args:
        block: the last of its group, unless ``always``.
    """
    group = group_of(block)
    if group is None or not (always or group.offload_leader is block):
        return
    if _are_on(group, group.onload_device):
        group.offload_()


def _are_on(group: Any, device: torch.device) -> bool:
    """Where one of the group is, all are."""
    first = next(_tensors(group), None)
    return first is not None and first.device.type == torch.device(device).type


def _tensors(group: Any) -> Iterator[Tensor]:
    for module in group.modules:
        yield from module.parameters()
    yield from group.parameters
    yield from group.buffers


class Once:
    """The forward of a block, hooks included, that a step may or may not call.

    Args:
        block: the module.
        forward: of it.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block, self._forward, self._called = block, forward, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._called = True
        group = group_of(self._block)
        if group is not None and group.onload_leader not in (None, self._block):
            bring(self._block)  # who should have done that may have been left out
        return self._forward(*args, **kwargs)

    def settle(self) -> None:
        """The step has gone past the block."""
        if not self._called:
            take_away(self._block)


def is_in_front(stand_in: InsteadOfForward) -> bool:
    """Whether no hook of group offloading is in front of what stands in, put on since or left."""
    own = stand_in.module.__dict__
    forward = own.get("forward")
    hidden = forward is not stand_in and is_wrapper(forward) and "_hf_hook" not in own
    return not hidden or group_of(stand_in.module) is None


def rise(stand_in: InsteadOfForward) -> None:
    """In front of hooks of group offloading that were put on since.

    Also where one that was behind went: diffusers then puts back the forward that this one wrapped.
    The hook of streams goes so in its first call.
    """
    if stand_in.active and not is_in_front(stand_in):
        stand_in.take_off()
        stand_in.put_on()


def weights_to_come(model: nn.Module, device: torch.device) -> int:
    """Bytes of weights that a call will bring to its device: all, or some blocks at a time.

    Args:
        model: the transformer.
        device: where it computes.
    """
    away = [p.nbytes for p in model.parameters() if p.device.type != device.type]
    by_parts = any(True for child in model.children() for m in child.modules() for _ in hooks_of(m))
    if not by_parts:
        return sum(away)
    blocks = (block for child in model.children() for block in child.children())
    sizes = (sum(p.nbytes for p in block.parameters()) for block in blocks)
    return 2 * max(sizes, default=0)
