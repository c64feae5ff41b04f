"""Put an engine on a model and take it off again, instance by instance.

A block's ``forward`` is stood in for by a :class:`BlockForward`; the model itself carries torch
hooks around each call, and a stateful hook that diffusers tells the cache context. What is put on
an instance belongs to that instance: a deep copy or a pickle of the model is the stock model.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import Tensor, nn

from flashomni.engine import Engine
from flashomni.engine.call import Place
from flashomni.engine.callers import calling_pipeline
from flashomni.engine.layer import LayerRun
from flashomni.engine.memory import advise
from flashomni.engine.runtime import Runtime
from flashomni.models import Adapter, Site
from flashomni.models._elsewhere import look
from flashomni.models._hooks import execution_device
from flashomni.models._offload import Once, bring, group_of, is_in_front, rise, take_away
from flashomni.models._reorder import around, exit_of, in_order, tokens_of
from flashomni.models._spread import Spread
from flashomni.models._stand_in import InsteadOfForward, places, stock_forward

NAME = "flashomni"


class BlockForward(InsteadOfForward):
    """Runs a block through the engine while a call of its model is under way.

    Behind the hooks that bring the block's weights; :class:`InFront` of them it decides whether to.

    Args:
        runtime: of the model.
        index: of the block.
        site: of the block.
        leaves: whether tokens get back the model's own order behind it.
        spread: spreads the sequence over ranks.
    """

    def __init__(
        self, runtime: Runtime, index: int, site: Site, leaves: bool, spread: Spread
    ) -> None:
        super().__init__(site.block, inside=True)
        self.runtime, self.index, self.site, self.spread = runtime, index, site, spread
        self.names = list(inspect.signature(site.run).parameters)[2:]  # behind run and block
        self.leaves = leaves
        self._probe_options: dict[str, Any] = {}
        if site.modulated is not None and "backend" in inspect.signature(site.modulated).parameters:
            self._probe_options["backend"] = runtime.backend
        self._run: LayerRun | None = None
        self._front: InFront | None = None

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, self._run = self._run, None
        if run is not None:
            return self.site.run(run, self.site.block, *args, **kwargs)
        return self.through(self.original, None, args, kwargs)

    def through(
        self,
        stock: Callable[..., Any],
        hooked: Callable[..., Any] | None,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """What the block returns.

        Args:
            stock: runs where no call of the model is under way.
            hooked: brings the weights and calls this object again; ``None`` where they are there.
            args: of the block, like ``kwargs``.
        """
        runtime, site = self.runtime, self.site
        if not self.active or not runtime.running:  # the block is called by itself
            return stock(*args, **kwargs)
        tokens = tokens_of(runtime)
        if tokens is not None:
            args, kwargs = in_order(tokens, site, self.names, self.index == 0, args, kwargs)
        if self.spread.active:
            args, kwargs = self.spread.enter(self.index, self.names, args, kwargs)
        streams = tuple(
            kwargs[name] if name in kwargs else args[self.names.index(name)]
            for name in site.streams
        )
        forward = None if hooked is None else Once(site.block, hooked)

        def compute(run: LayerRun) -> tuple[Tensor, ...]:
            if forward is None:
                return site.unpack(site.run(run, site.block, *args, **kwargs))
            self._run = run
            try:
                return site.unpack(forward(*args, **kwargs))
            finally:
                self._run = None

        def modulated() -> Tensor:
            assert site.modulated is not None
            bring(site.block)
            return site.modulated(site.block, *args, **kwargs, **self._probe_options)

        place = Place(streams, site.main, None if site.modulated is None else modulated)
        behind = list(runtime.block(self.index, place, compute, site.chain))
        if self.spread.active:
            behind = self.spread.leave(self.index, behind)
        if tokens is not None and self.leaves:
            behind[site.main] = tokens.leave(behind[site.main], site.vision)
        if forward is None:
            return site.pack(tuple(behind))
        forward.settle()
        if site.derived:
            bring(site.block)
        output = site.pack(tuple(behind))
        if site.derived:
            take_away(site.block)
        return output

    def rise(self) -> None:
        """Be in front, too, of hooks of group offloading."""
        if self.active and group_of(self.module) is not None and not self._is_in_front():
            self._front = InFront(self)

    def _is_in_front(self) -> bool:
        return self._front is not None and is_in_front(self._front)

    def take_off(self) -> None:
        super().take_off()
        if self._front is not None:
            self._front.take_off()
            self._front = None


class InFront(InsteadOfForward):
    """A :class:`BlockForward` in front of the hooks that bring the block's weights."""

    def __init__(self, block: BlockForward) -> None:
        super().__init__(block.module)
        self._block = block

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return self._block.through(self.original, self.original, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        return copy.deepcopy(self.original, memo)


class ModelForward(InsteadOfForward):
    """Lets the engine replay the model, or forecast its output; and learn of an interrupt."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime.model)
        self.runtime = runtime

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active or (torch.compiler.is_compiling() and not at_output(self.runtime)):
            return self.original(*args, **kwargs)
        return self._run(*args, **kwargs)

    @torch.compiler.disable
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.runtime.forward(args, kwargs, self.original)

    def rise_after(self) -> None:
        rise(self)  # a model that is not called needs no weights


def at_output(runtime: Runtime) -> bool:
    """Whether the recipe does something about the output of the whole model."""
    recipe = runtime.recipe
    return recipe.at_output or recipe.guidance.acts or runtime.cfg is not None


def _inert(*_: Any) -> None:
    """What the hooks below are in a copy of the model."""


def _make_inert() -> Callable[..., None]:
    return _inert


class CallHook:
    """A torch hook of the model that tells the runtime about a call.

    Args:
        runtime: what to tell.
        tell: called with the arguments of the hook, without the module.
    """

    def __init__(self, runtime: Runtime, tell: Callable[..., None]) -> None:
        self.runtime, self._tell = runtime, tell
        self.engine: Engine | None = None

    @torch.compiler.disable
    def __call__(self, module: nn.Module, *values: Any) -> None:
        if module is self.runtime.model:
            self._tell(*values)

    def __deepcopy__(self, memo: dict) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


class _NoState(BaseState):
    def reset(self, *args: Any, **kwargs: Any) -> None:
        """The engine keeps the state."""


class ContextHook(ModelHook):
    """Is told the cache context by diffusers, and that a pipeline is done. Changes no forward."""

    _is_stateful = True

    def __init__(self, runtime: Runtime | None = None) -> None:
        super().__init__()
        self.manager = StateManager(_NoState)
        self.fn_ref = HookFunctionReference()
        self._runtime = None if runtime is None else weakref.ref(runtime)

    @property
    def context(self) -> Any:
        """diffusers' cache context, or its name in older releases, or ``None``."""
        manager = self.manager
        return getattr(manager, "_context", None) or getattr(manager, "_current_context", None)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """A pipeline is done: free its caches."""
        self.manager.reset()
        runtime = None if self._runtime is None else self._runtime()
        if runtime is not None and runtime.model is module:
            runtime.done(calling_pipeline(module))
        return module

    def __deepcopy__(self, memo: dict) -> ContextHook:
        return ContextHook()

    def __reduce__(self) -> Any:
        return ContextHook, ()

    def put_on(self, model: nn.Module) -> None:
        """Into the model's registry, in front of hooks that wrap forwards: it wraps none."""
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.hooks[NAME] = self
        registry._hook_order.insert(0, NAME)
        registry._fn_refs.insert(0, self.fn_ref)
        _forget_children(model)


def take_off_context(model: nn.Module) -> None:
    """Remove a :class:`ContextHook`, and the registry if nothing else is in it."""
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or NAME not in registry.hooks:
        return
    place = registry._hook_order.index(NAME)
    del registry.hooks[NAME], registry._hook_order[place], registry._fn_refs[place]
    if not registry.hooks:
        del model._diffusers_hook
    _forget_children(model)


def attach(runtime: Runtime, sites: list[Site], adapter: Adapter) -> Callable[[], None]:
    """Install a runtime on its model; on any failure nothing is left there.

    Args:
        runtime: what runs.
        sites: the blocks.
        adapter: of the model; what it wants to stand in puts itself on the model when asked for.

    Returns:
        What takes it off again.
    """
    model = runtime.model
    installed: list[InsteadOfForward] = []
    handles: list[Any] = []
    clear_remains(model, sites)

    def detach() -> None:
        for handle in handles:
            handle.remove()
        for stand_in in reversed(installed):
            stand_in.take_off()
        take_off_context(model)

    elsewhere = look(runtime, adapter.latents)

    def begin(args: tuple, kwargs: dict) -> None:
        runtime.begin(context.context, execution_device(model, sites[0].block), args, kwargs)
        elsewhere(args, kwargs)
        for stand_in in installed:
            stand_in.rise()

    def leave(*_: Any) -> None:
        if runtime.running and runtime.last is not None:
            advise(sys.exc_info()[1], runtime.recipe, *runtime.last.nbytes())
        runtime.abort()
        for stand_in in installed:
            stand_in.rise_after()

    context = ContextHook(runtime)
    try:
        context.put_on(model)
        stand_ins = adapter.stand_ins(runtime)
        if stand_ins is None:
            leaves = len(sites) - 1 if not exit_of(runtime, adapter) else None
            spread = Spread(runtime, sites, adapter)
            stand_ins = (
                BlockForward(runtime, i, site, i == leaves, spread) for i, site in enumerate(sites)
            )
        for stand_in in itertools.chain(stand_ins, around(runtime, adapter)):
            installed.append(stand_in)
        installed.append(ModelForward(runtime))
        pre, post, always = (
            CallHook(runtime, begin),
            CallHook(runtime, lambda _, output: runtime.end(output)),
            CallHook(runtime, leave),
        )
        handles.append(model.register_forward_pre_hook(pre, with_kwargs=True))
        handles.append(model.register_forward_hook(post))
        handles.append(model.register_forward_hook(always, always_call=True))
    except BaseException:
        detach()
        raise
    return detach


def is_ours(thing: Any) -> bool:
    """Whether a hook or a forward is the engine's."""
    return isinstance(thing, (InsteadOfForward, CallHook, ContextHook)) or thing is _inert


def call_hook(model: nn.Module) -> CallHook | None:
    """The hook by which an engine that is on ``model`` is found."""
    hooks = model._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, CallHook)), None)


def clear_remains(model: nn.Module, sites: list[Site]) -> None:
    """Take off what an engine that was removed, or that is on another copy, left on ``model``.

    It happens where another hook lay on top of ours when we went, and gave our forward back later.
    """
    for module in (model, *(site.block for site in sites)):
        for holder, slot in places(module):
            left = holder.get(slot)
            if isinstance(left, InsteadOfForward) and not left.active:
                left.take_off()
        if module.__dict__.get("forward") == stock_forward(module):
            del module.__dict__["forward"]
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook is _inert]:
            del hooks[key]
    if call_hook(model) is None:
        take_off_context(model)


def _forget_children(model: nn.Module) -> None:
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()
