"""What caches of whole layers, and of the output, take: from shapes, before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flashomni.engine import Recipe
from flashomni.engine.arguments import by_name
from flashomni.engine.memory import Shapes
from flashomni.engine.state.output import take_apart
from flashomni.engine.state.storage import Storage
from flashomni.models import Adapter, Site, find_adapter
from flashomni.models.generic.attention import SDPA, Attention


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


def call_shapes(
    model: nn.Module,
    sites: Sequence[Site],
    inputs: Mapping[str, Any],
    has_text: bool | None = None,
) -> Shapes:
    """What a call handles, of the shapes of its arguments; nothing is computed.

    Args:
        model: a transformer of diffusers, wherever its weights are and whatever they are.
        sites: its blocks.
        inputs: arguments of the call, by name.
        has_text: whether the text is in the sequence of its attention, where that is known; else
            it is not where an attention across is called.

    Raises:
        NotImplementedError: it cannot be built, or called, without weights.
    """
    name = type(model).__name__
    tensors = (x for x in tree_leaves(dict(inputs)) if isinstance(x, Tensor))
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
    try:
        config = {k: v for k, v in model.config.items() if k != "quantization_config"}  # type: ignore[union-attr,operator]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initialising nothing
            hollow = type(model).from_config(config).eval()  # type: ignore[attr-defined]
        nn.Module.to(hollow, dtype)
        given = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, dict(inputs))
        with torch.no_grad():
            return _watched(hollow, sites, given, has_text)
    except Exception as error:  # whatever a model does with values that it does not have
        raise NotImplementedError(
            f"memory= asks what a call of {name} handles, and it cannot be called without weights "
            f"({error}); leave memory out, and set what accelerate's docstring names"
        ) from error


def _watched(
    model: nn.Module, sites: Sequence[Site], inputs: dict[str, Any], has_text: bool | None
) -> Shapes:
    streams: list[list[Tensor]] = []
    attention = [torch.empty(0)] * len(sites)
    output: list[Tensor] = []
    mode = _Largest()

    def look(place: int, module: nn.Module, args: tuple, behind: Any) -> None:
        found: list[Tensor] = []
        take_apart(behind, found)
        streams.append(found)
        if mode.largest is not None:
            attention[place], mode.largest = mode.largest, None

    for place, site in enumerate(sites):
        model.get_submodule(site.name).register_forward_hook(partial(look, place))
    with mode:
        take_apart(model(**inputs), output)
    widest = max(streams, key=lambda found: sum(x.nbytes for x in found), default=[])
    apart = frozenset(i for i, site in enumerate(sites) if not site.chain or not site.streams)
    has_text = not mode.crosses if has_text is None else has_text
    names = tuple(site.name for site in sites)
    shapes = (_shapes(widest), _shapes(attention), _shapes(output))
    return Shapes(*shapes, apart, has_text, names)


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((x.shape, x.dtype) for x in tensors)


class _Largest(TorchFunctionMode):
    """Keeps the queries of the largest attention that was called; and whether any is across."""

    largest: Tensor | None = None
    crosses: bool = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is SDPA:
            call = Attention.of(args, kwargs or {})
            q, self.crosses = call.q, self.crosses or call.q.shape[-2] != call.k.shape[-2]
            if self.largest is None or q.numel() > self.largest.numel():
                self.largest = q
        return func(*args, **(kwargs or {}))


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
    given = by_name(block, args, kwargs)
    return [given[name] for name in site.streams]


def _history(tensors: list[Tensor], recipe: Recipe) -> int:
    """Bytes of the terms that are kept: one more than the order."""
    kept = Storage(recipe.storage.history_dtype)
    total = sum(kept.nbytes(tensor.shape, tensor.dtype, wide=True) for tensor in tensors)
    return total * (recipe.forecast.layer_order + 1)
