"""Which ranks share an accelerated model's sequence: as accelerate was told, or diffusers was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from flashomni.engine import Recipe
from flashomni.engine.sharding import Found, config_of, why_not
from flashomni.models import Adapter
from flashomni.models._relies import PROCESSOR
from flashomni.parallel import Ranks

INSTEAD = "call accelerate(..., ulysses=n) without enable_parallelism"


class Theirs:
    """diffusers' context parallelism on a model, put aside while the engine does it.

    Its hooks split what modules get, and its attention processors exchange heads. The blocks' part
    of both is ours now, so the hooks come off, and go on again when the engine goes.

    Args:
        model: which carries them, now or later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[tuple[nn.Module, str, Any]] = []
        self._processors: list[tuple[Any, Any]] = []

    def root(self) -> list[str]:
        """Token streams that the model itself gets a part of."""
        hooks = getattr(getattr(self._model, "_diffusers_hook", None), "hooks", {})
        found = [hook for name, hook in hooks.items() if name.startswith("cp_input")]
        return [name for hook in found for name in hook.metadata if name != "timestep"]

    def put_aside(self) -> None:
        """Take off what is on the model now."""
        for module in self._model.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            names = [] if registry is None else [n for n in registry.hooks if n.startswith("cp_")]
            for name in names:
                self._hooks.append((module, name, registry.hooks[name]))
                registry.remove_hook(name, recurse=False)
            processor: Any = getattr(module, "processor", None)
            config = getattr(processor, "_parallel_config", None)
            if config is not None:
                self._processors.append((processor, config))
                processor._parallel_config = None

    def put_back(self) -> None:
        """As it was."""
        from diffusers.hooks import HookRegistry

        for module, name, hook in self._hooks:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        for processor, config in self._processors:
            processor._parallel_config = config
        self._hooks, self._processors = [], []


def find_ranks(
    model: nn.Module, adapter: Adapter, recipe: Recipe, given: Ranks | None, theirs: Theirs
) -> Found | None:
    """The ranks that share a model's sequence.

    Args:
        model: the transformer.
        adapter: of it.
        recipe: what is to run.
        given: the ranks that accelerate was told of.
        theirs: what diffusers put on the model.

    Returns:
        ``None`` for a model on one card.

    Raises:
        NotImplementedError: a kind of parallelism, a model or a recipe for which there is none.
    """
    config, name = config_of(model), type(model).__name__
    context = getattr(config, "context_parallel_config", None)
    for each in adapter.relies_on(model):
        own = getattr(each.module, "_parallel_config", None)
        if each.why == PROCESSOR and own is not None and own is not config:
            raise NotImplementedError(
                f"{each.name}: context parallelism of this attention alone is not supported; call "
                "transformer.enable_parallelism"
            )
    if given is not None and config is not None:
        raise NotImplementedError(
            f"{name}: accelerate(..., ulysses=n) and enable_parallelism both share its sequence; "
            "leave one of them out"
        )
    if given is not None:
        _refuse([*_why_alone(model, adapter), *_of_recipe(recipe, True)])
        return Found(given)
    if config is None:
        return None
    if context is None:
        raise NotImplementedError(
            f"{name}: tensor parallelism is not supported, context parallelism with an "
            "ulysses_degree is"
        )
    reasons, inside = [], "parallel" not in vars(type(adapter))
    if context.ring_degree > 1:
        kind = "ring attention" if context.ulysses_degree == 1 else "ring with Ulysses (unified)"
        reasons.append(f"{kind} is not, an ulysses_degree alone is")
    if inside:
        reasons += _why_alone(model, adapter)
        split = theirs.root()
        if split:
            reasons.append(
                f"diffusers' plan for {name} gives it a part of {', '.join(split)}: {INSTEAD}"
            )
    heads = getattr(model.config, "num_attention_heads", context.ulysses_degree)
    if heads < context.ulysses_degree:
        reasons.append(f"{heads} heads cannot be shared out among {context.ulysses_degree} ranks")
    _refuse([*reasons, *_of_recipe(recipe, inside)])
    if inside:
        theirs.put_aside()
    ranks = Ranks(context._ulysses_mesh.get_group())
    return Found(ranks, inside or bool(context.ulysses_anything), inside)


def _why_alone(model: nn.Module, adapter: Adapter) -> list[str]:
    """Why the model runs on one card alone."""
    if all(site.sequence for site in adapter.sites(model)):
        return []
    return [f"not for {type(model).__name__}: its adapter does not share it out; run it on one"]


def _of_recipe(recipe: Recipe, inside: bool) -> list[str]:
    return [f"not with recipe {recipe.name}: {reason}" for reason in why_not(recipe, inside)]


def _refuse(reasons: Iterable[str]) -> None:
    found = "; ".join(reasons)
    if found:
        raise NotImplementedError(f"context parallelism is not supported: {found}")
