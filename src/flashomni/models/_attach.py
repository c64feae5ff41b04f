"""Put an engine on a model and take it off again, through the hooks torch and diffusers offer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch import nn

from flashomni.engine import Engine
from flashomni.models import Site

NAME = "flashomni"


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """The engine keeps the state."""


class BlockHook(ModelHook):
    """Runs a block through the engine. Stateful, so that diffusers tells it the cache context."""

    _is_stateful = True

    def __init__(self, engine: Engine, index: int, site: Site) -> None:
        super().__init__()
        self.engine, self.index, self.site = engine, index, site
        places = list(inspect.signature(site.run).parameters)[3:]  # after engine, index and block
        self.places = {name: places.index(name) for name in site.streams}
        self.manager = StateManager(_NoState)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.engine.running:  # the block is called by itself, outside of the model
            return self.fn_ref.original_forward(*args, **kwargs)
        streams = tuple(
            kwargs[name] if name in kwargs else args[place] for name, place in self.places.items()
        )
        return self.engine.block(
            self.index,
            streams,
            lambda: self.site.run(self.engine, self.index, module, *args, **kwargs),
        )

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline is done: free the caches."""
        self.manager.reset()
        if self.index == 0 and not self.engine.running:
            self.engine.reset()
        return module

    @property
    def context(self) -> str | None:
        """Name of diffusers' cache context, where the pipeline enters one."""
        context = getattr(self.manager, "_context", None) or getattr(
            self.manager, "_current_context", None
        )
        return getattr(context, "name", context)


def attach(engine: Engine, model: nn.Module, sites: list[Site]) -> None:
    """Install ``engine``; on any failure nothing is left on ``model``."""
    if getattr(model, "_is_cached", False):
        raise NotImplementedError("cache-dit is enabled on the transformer: disable it first")
    for site in sites:
        _refuse_hooked(site)
    hooks = [BlockHook(engine, index, site) for index, site in enumerate(sites)]
    new_registries = [
        module
        for module in (model, *(site.block for site in sites))
        if not hasattr(module, "_diffusers_hook")
    ]
    handles: list[Any] = []

    def detach() -> None:
        for handle in handles:
            handle.remove()
        for site in sites:
            registry = getattr(site.block, "_diffusers_hook", None)
            if registry is not None and NAME in registry.hooks:
                registry.remove_hook(NAME, recurse=False)
                if not registry.hooks:
                    site.block.__dict__.pop("forward", None)  # back to the class's own
        for module in new_registries:
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None and not registry.hooks:
                del module._diffusers_hook
        _forget_children(model)

    try:
        for site, hook in zip(sites, hooks, strict=True):
            HookRegistry.check_if_exists_or_initialize(site.block).register_hook(hook, NAME)
        _forget_children(model)
        handles.append(
            model.register_forward_pre_hook(
                lambda module, *_: engine.begin(hooks[0].context, _device(module, sites[0].block)),
                with_kwargs=True,
            )
        )
        handles.append(model.register_forward_hook(lambda *_: engine.end()))
        handles.append(model.register_forward_hook(lambda *_: engine.abort(), always_call=True))
    except BaseException:
        detach()
        raise
    engine.attach(detach)


def _device(model: nn.Module, block: nn.Module) -> torch.device:
    """Where the model computes: under offloading its weights rest elsewhere between calls."""
    execution = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if execution is None:
        return next(block.parameters()).device
    return (
        torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    )


def _forget_children(model: nn.Module) -> None:
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()


def _is_replaced(block: nn.Module) -> bool:
    """Whether the block's forward is not its class's (a disabled cache leaves just that one)."""
    forward = block.__dict__.get("forward")
    if forward is None:
        return False
    bound = getattr(forward, "__self__", None) is block
    return not (bound and getattr(forward, "__func__", None) is type(block).forward)


def _refuse_hooked(site: Site) -> None:
    """A hook that is on the block already would be left out by ours: refuse it by name."""
    registry = getattr(site.block, "_diffusers_hook", None)
    if registry is not None and NAME in registry.hooks:
        raise ValueError("the pipeline is accelerated already: call engine.remove() first")
    others = [] if registry is None else list(registry.hooks)
    for module in site.block.modules():
        # An attention module is never called as a whole: what hooks it (Pyramid Attention
        # Broadcast) would be left out.
        if module is not site.block and hasattr(module, "processor"):
            others += getattr(getattr(module, "_diffusers_hook", None), "hooks", ())
    if getattr(site.block, "_hf_hook", None) is not None:
        others.append(type(site.block._hf_hook).__name__)
    if others or _is_replaced(site.block):
        raise NotImplementedError(
            f"{site.name} carries the hook {', '.join(others) or 'of a replaced forward'} "
            "(a diffusers cache, group offloading or sequential offloading), which cannot be "
            "combined; disable it first. enable_model_cpu_offload works."
        )
    if getattr(site.block, "_compiled_call_impl", None) is not None:
        raise NotImplementedError(f"{site.name} is compiled: accelerate it first, then compile")
