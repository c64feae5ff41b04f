"""Hooks of others on a model: those that bring weights are kept, all others are refused.

Group and sequential offloading keep weights elsewhere between forwards, layerwise casting keeps
them in a smaller dtype. Their hooks wrap forwards, on blocks or on what is inside them: blocks run
behind those hooks (:mod:`flashomni.models._offload`), and a hooked module is called.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flashomni.models import Site
from flashomni.models._stand_in import InsteadOfForward, places, stock_forward

BRINGING = ("diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting")
ALIGNING = ("AlignDevicesHook", "CpuOffload")  # of accelerate
WRAPPERS = ("diffusers.hooks.hooks", "accelerate.hooks")  # whose functions stand in for forwards


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Hooks of diffusers and accelerate on a module, with the names by which users know them."""
    registry = module.__dict__.get("_diffusers_hook")
    yield from () if registry is None else registry.hooks.items()
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):  # several of accelerate's are one
        if each is not None:
            yield type(each).__name__, each


def foreign_hooks(module: nn.Module) -> list[str]:
    """Names of hooks that do more than to bring weights and to move inputs."""
    return [name for name, hook in hooks_of(module) if not _brings(hook)]


def _brings(hook: Any) -> bool:
    cls = type(hook)
    if cls.__module__ == "accelerate.hooks":
        return cls.__name__ in ALIGNING
    return cls.__module__ in BRINGING and not hasattr(hook, "new_forward")


def refuse_hooked(model: nn.Module, sites: list[Site]) -> None:
    """Refuse, by name, what would be left out or run twice; ours are no reason.

    Raises:
        NotImplementedError: a diffusers cache, cache-dit, weights that nothing brings, a compiled
            block, or a replaced forward.
    """
    if getattr(model, "_is_cached", False):
        raise NotImplementedError("cache-dit is enabled on the transformer: disable it first")
    cache = getattr(model, "_cache_config", None)
    for site in sites:
        _refuse_block(site)
    if cache is not None:
        raise NotImplementedError(
            f"the transformer has a diffusers cache ({type(cache).__name__}), which cannot be "
            "combined with ours; call transformer.disable_cache() first"
        )


def _refuse_block(site: Site) -> None:
    block = site.block
    others = foreign_hooks(block)
    for module in block.modules():
        # An attention module is never called as a whole: what hooks it (Pyramid Attention
        # Broadcast) would be left out.
        if module is not block and hasattr(module, "processor"):
            others += foreign_hooks(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta" and "_hf_hook" not in module.__dict__:
                raise NotImplementedError(
                    f"{site.name}: {name} has no data, and no hook that would bring it: load the "
                    "weights first"
                )
    if others or _is_replaced(block):
        raise NotImplementedError(
            f"{site.name} carries the hook {', '.join(others) or 'of a replaced forward'} "
            "(a diffusers cache or the like), which cannot be combined; disable it first"
        )
    if getattr(block, "_compiled_call_impl", None) is not None:
        raise NotImplementedError(f"{site.name} is compiled: accelerate it first, then compile")


def _is_replaced(block: nn.Module) -> bool:
    """Whether a forward of the block is neither its class's, nor ours, nor a hook's."""
    stock = stock_forward(block)  # which a disabled cache leaves
    forwards = [holder.get(slot) for holder, slot in places(block)]
    return not all(
        each is None or each == stock or isinstance(each, InsteadOfForward) or is_wrapper(each)
        for each in forwards
    )


def is_wrapper(forward: Any) -> bool:
    """Whether a forward is a hook's of diffusers or accelerate, which calls the one behind it."""
    return getattr(getattr(forward, "func", None), "__module__", None) in WRAPPERS


def execution_device(model: nn.Module, block: nn.Module) -> torch.device:
    """Where the model computes: under offloading its weights rest elsewhere between calls.

    Args:
        model: the model.
        block: one of its blocks.
    """
    for module in (model, *block.modules()):
        for _, hook in hooks_of(module):
            device = getattr(hook, "execution_device", None)
            device = getattr(getattr(hook, "group", None), "onload_device", device)
            if device is not None:
                return _with_index(device)
    weights = itertools.chain(block.parameters(), block.buffers(), model.parameters())
    return next(weights).device  # quantised ones may all be buffers


def _with_index(device: torch.device | str | int) -> torch.device:
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
