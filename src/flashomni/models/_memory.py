"""What caches of whole layers, and of the output, take: from shapes, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import Recipe
from flashomni.engine.state.output import take_apart
from flashomni.engine.state.storage import Storage
from flashomni.models import Adapter, Site, find_adapter


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one conditioning branch.

    Attributes:
        output: of the history of what the model returns.
        layers: of the history of what all layers together add to their streams.
    """

    output: int
    layers: int


def cache_bytes(
    model: nn.Module, inputs: Mapping[str, Any], recipe: Recipe | str = "taylorseer"
) -> CacheBytes:
    """What a recipe that caches every layer whole keeps, at either level; nothing is computed.

    The model is built again without weights, from its configuration, and called with the shapes of
    the inputs.

    Args:
        model: a transformer of diffusers that an adapter knows; it may lie on ``meta`` itself.
        inputs: arguments of a call, by name; tensors may lie on ``meta``.
        recipe: whose forecast order and storage count.

    Raises:
        ValueError: no adapter knows the model.
    """
    recipe, adapter = Recipe.of(recipe), find_adapter(model)
    parameter = next(model.parameters())
    hollow = model
    if parameter.device.type != "meta":
        with torch.device("meta"):
            hollow = getattr(type(model), "from_config")(model.config)  # noqa: B009
        nn.Module.to(hollow, parameter.dtype)  # the class's own warns of what is no matter here
    given = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    found: list[Tensor] = []
    with torch.no_grad():
        streams = _streams(adapter, hollow, given, found)
    return CacheBytes(*(_history(tensors, recipe) for tensors in (found, streams)))


def _streams(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], output: list[Tensor]
) -> list[Tensor]:
    """Streams in front of the last block, which all of a run of whole layers have."""
    seen: list[Tensor] = []
    site = adapter.sites(model)[-1]

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.extend(_named(site, module, args, kwargs))

    handle = site.block.register_forward_pre_hook(look, with_kwargs=True)
    try:
        take_apart(model(**inputs), output)
    finally:
        handle.remove()
    return seen


def _named(site: Site, block: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return [given[name] for name in site.streams]


def _history(tensors: list[Tensor], recipe: Recipe) -> int:
    """Bytes of the terms that are kept: one more than the order."""
    storage, total = Storage(recipe.storage.history_dtype), 0
    for tensor in tensors:
        wide = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
        kept = storage.resolve(wide)
        scales = tensor.shape[:-1].numel() * wide.itemsize if kept.itemsize == 1 else 0
        total += tensor.numel() * kept.itemsize + scales
    return total * (recipe.forecast.layer_order + 1)
