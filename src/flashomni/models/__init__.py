"""Adapters: one file a diffusers transformer class, found by name; and ``accelerate``.

An adapter lists the blocks of its model and runs one block with the engine's calls. It is the only
place that knows the model. Importing this package loads no diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import Clock, Engine, Recipe
from flashomni.kernels import OPS, registered
from flashomni.registry import Registry

BlockRun = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Site:
    """One transformer block.

    Args:
        name: its path in the model.
        block: the module.
        run: ``run(engine, index, block, *args, **kwargs)`` computes what ``block(*args, **kwargs)``
            would, with the engine's calls. Its parameters carry the names of the block's own,
            because models pass keywords. What all blocks of a call share (a valid length, RoPE
            tables) goes through ``engine.memo``.
        streams: the parameters of ``run`` that are the block's token streams, in the order in which
            it returns them. A block that is cached whole only adds to them.
    """

    name: str
    block: nn.Module
    run: BlockRun
    streams: tuple[str, ...]


class Adapter:
    """What the engine needs to know about one transformer class."""

    transformer: ClassVar[str]

    def sites(self, model: nn.Module) -> list[Site]:
        """The blocks with joint or self attention, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement sites")

    def check(self, model: nn.Module) -> None:
        """Raise ``NotImplementedError`` for a variant of the model that the adapter cannot run."""

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        """A small random model and the arguments of one call, for the contract tests.

        The sequence must not be a multiple of 128 tokens, and neither must the text. Arguments are
        tensors or lists with the batch (2) first, except those with "ids" in their name;
        ``hidden_states`` has the shape of the output, ``encoder_hidden_states`` is the text.
        """
        raise TypeError(f"{type(self).__name__} does not implement tiny")


ADAPTERS: Registry[Adapter] = Registry("adapter", "flashomni.models", "flashomni.adapters")


def adapter(transformer: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Register an adapter for the transformer class of that name."""

    def keep(cls: type[Adapter]) -> type[Adapter]:
        ADAPTERS.add(transformer, cls(), cls)
        cls.transformer = transformer
        return cls

    return keep


def adapters() -> dict[str, Adapter]:
    """Every adapter by the name of its transformer class."""
    return ADAPTERS.all()


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a transformer, by the names of its class and base classes.

    Raises:
        ValueError: there is none; the message lists the classes that are supported.
    """
    known = adapters()
    for cls in type(model).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise ValueError(
        f"transformer must be one of {', '.join(adapters())}, got {type(model).__name__}"
    )


def accelerate(
    pipe: Any, recipe: Recipe | str | Path = "balanced", *, backend: str | None = None
) -> Engine:
    """Make a diffusers pipeline generate faster. ``engine.remove()`` undoes it exactly.

    Args:
        pipe: a pipeline whose ``transformer`` is supported, or such a transformer itself (then
            call ``engine.step(i, num_steps)`` before each call of it).
        recipe: a preset, a policy's name, a path to a recipe's JSON, or a ``Recipe``.
        backend: take exactly this backend in every op; by default the best that accepts.

    Returns:
        The engine, which reports and can be removed; also a context manager.

    Raises:
        ValueError: the recipe, the backend or the model is unknown, or the pipeline is accelerated
            already.
        NotImplementedError: the model is in a state that cannot be accelerated; the message names
            it. Nothing is left on the pipeline in either case.
    """
    recipe = Recipe.of(recipe)
    names = sorted({each.name for op in OPS for each in registered(op)})
    if backend is not None and backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, got {backend!r}")
    is_module = isinstance(pipe, nn.Module)
    model = pipe if is_module else getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"pipe must be a diffusers pipeline with a transformer, or one of "
            f"{', '.join(adapters())}; got {type(pipe).__name__}"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise NotImplementedError("the transformer is compiled: accelerate it first, then compile")
    found = find_adapter(model)
    found.check(model)
    sites = found.sites(model)
    if not is_module and not hasattr(getattr(pipe, "scheduler", None), "step_index"):
        raise ValueError(
            "the pipeline's scheduler must have step_index (the flow-match and multistep "
            f"schedulers do), got {type(getattr(pipe, 'scheduler', None)).__name__}; accelerate "
            "pipe.transformer instead and call engine.step(i, num_steps)"
        )
    engine = Engine(
        type(model).__name__,
        recipe,
        [site.name for site in sites],
        Clock(None if is_module else pipe),
        backend,
    )
    from flashomni.models._attach import attach

    attach(engine, model, sites)
    return engine
