"""How much a recipe keeps, of shapes alone; and what to lower until that fits.

Bytes are those of one generation at its peak: of a policy that chooses, as if it cached tiles in
every layer and all that is cached whole in one run. Which layers those are is known only later.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flashomni.engine.groups import Division
from flashomni.engine.recipe import Recipe
from flashomni.engine.state.room import HOST_SHARE, free_bytes
from flashomni.engine.state.storage import Storage
from flashomni.symbols import Grid
from flashomni.util.words import in_bytes

AUTO_SHARE = 0.5  # of what is free before the first step: steps need the rest in passing
SMALL = 2**20  # bytes that are not worth a word
UNITS = {"": 1, "B": 1, **{f"{p}{b}B": (1000 if not b else 1024) ** (i + 1)
         for i, p in enumerate("KMGT") for b in ("", "i")}}  # fmt: skip
NOTHING: tuple[str, ...] = ()
ORDERS = ("order", "layer_order")
log = logging.getLogger("flashomni")


@dataclass(frozen=True)
class Shapes:
    """What one call of a model handles.

    Attributes:
        streams: of the widest run of blocks, shape and dtype each.
        attention: what each block's largest attention gives, ``[B, H, S, D]``; of one that has none
            nothing, ``[0]``.
        output: of the model.
        apart: positions of blocks that are cached each by itself where all are cached whole.
        has_text: whether the text is in the sequence of that attention.
        names: of the blocks, by which groups of layers choose theirs.
    """

    streams: tuple[tuple[torch.Size, torch.dtype], ...]
    attention: tuple[tuple[torch.Size, torch.dtype], ...]
    output: tuple[tuple[torch.Size, torch.dtype], ...]
    apart: frozenset[int] = frozenset()
    has_text: bool = True
    names: tuple[str, ...] = ()

    def runs(self, chosen: set[int]) -> int:
        """How many runs of these blocks are cached, where all are cached whole."""
        starts = sum(place - 1 not in chosen for place in chosen)
        return starts + len(chosen & self.apart)


@dataclass(frozen=True)
class Bytes:
    """What is kept, by what it is kept for.

    Attributes:
        output: of the model, forecast.
        layers: that are cached whole.
        tiles: of attention, and what they add behind the projection.
        carry: differences that sparse attention carries.
        on_host: whether tiles and carry lie in host memory.
        passing: of those, what is on the device while a layer runs; branches run in turn.
    """

    output: int = 0
    layers: int = 0
    tiles: int = 0
    carry: int = 0
    on_host: bool = False
    passing: int = 0

    @property
    def device(self) -> int:
        """On the device that computes."""
        beside = self.passing if self.on_host else self.tiles + self.carry
        return self.output + self.layers + beside

    @property
    def host(self) -> int:
        """In pinned host memory."""
        return self.tiles + self.carry if self.on_host else 0

    def times(self, branches: int) -> Bytes:
        """Of several branches."""
        names = ("output", "layers", "tiles", "carry")
        return replace(self, **{name: branches * getattr(self, name) for name in names})


def kept_bytes(recipe: Recipe, shapes: Shapes, device: str = "cuda") -> Bytes:
    """What a recipe keeps of one branch.

    Args:
        recipe: whose forecast, storage and carry count.
        shapes: of a call.
        device: type of the one that computes; only beside a card is there another memory.
    """
    storage = Storage(recipe.storage.history_dtype)
    on_host = recipe.storage.history_device == "host" and device == "cuda"
    grid = Grid(2, 2, text=(0, 1) if shapes.has_text else (0, 0))
    wide = partial(storage.nbytes, wide=True)
    tiles, carry, layers, refreshed = 0, 0, 0, 0
    for own, chosen in _divided(recipe, shapes):
        forecast, sparse = own.forecast, own.sparse
        attention = sum(storage.nbytes(*shapes.attention[place]) for place in chosen)
        if sparse.carries:
            terms = 2 if sparse.carry == "extrapolate" else 1
            carry += attention * terms
            each = (_refreshed(storage, *shapes.attention[place], terms) for place in chosen)
            refreshed = max(refreshed, *each, 0)
        policy = own.policy_for(grid)
        whole = sparse.degrade_below >= 1 and policy.known_fraction(grid) is not None
        if policy.caches and policy.name != "cached" and not whole and not recipe.at_output:
            # Of projected tiles: what differences need of O, and every term behind the projection.
            tiles += (2 * forecast.order + 1) * attention
        if own.skips and not recipe.at_output:
            size = (forecast.layer_order + 1) * sum(wide(*each) for each in shapes.streams)
            layers += size * shapes.runs(chosen)
    passing = 2 * tiles // max(sum(s.numel() > 0 for s, _ in shapes.attention), 1) + refreshed
    output = 0
    if recipe.skips and recipe.at_output:
        terms = recipe.forecast.layer_order + 1
        output = terms * sum(wide(*each) for each in shapes.output)
    return Bytes(output, layers, tiles, carry, on_host, passing)


def _refreshed(storage: Storage, shape: torch.Size, dtype: torch.dtype, terms: int) -> int:
    """D of one layer on the device while it is made anew, where it is kept on the host.

    D itself, what its differences are taken to, and all that the layer before has sent away. Steps
    between refreshes bring back no more than the terms of one layer at a time.
    """
    return shape.numel() * dtype.itemsize + (2 * terms - 1) * storage.nbytes(shape, dtype)


def _divided(recipe: Recipe, shapes: Shapes) -> Iterator[tuple[Recipe, set[int]]]:
    """The recipe of each group of layers, and positions of its layers."""
    if not recipe.groups:
        yield recipe, set(range(len(shapes.attention)))
        return
    division = Division.make(recipe, shapes.names)
    for number, own in enumerate(division.recipes):
        yield own, {place for place, of in enumerate(division.of) if of == number}


def ladder(
    recipe: Recipe,
    device: str = "cuda",
    helps: Callable[[Recipe, Recipe], bool] = lambda before, after: True,
    lowered: tuple[str, ...] = NOTHING,
) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """A recipe, then with one thing after another lowered, what costs least fidelity first.

    Args:
        recipe: to begin with.
        device: type of the one that computes; only beside a card is there another memory.
        helps: whether the second recipe keeps less than the first; else it is left out.
        lowered: what was lowered before.

    Yields:
        What was lowered, as settings, and the recipe.
    """
    yield lowered, recipe
    steps: list[dict[str, Any]] = [{"history_dtype": "float8"}]
    steps += [{"history_device": "host"}] if device == "cuda" else []
    steps += [{"carry": "off"}, {"layer_order": 1}, {"order": 0}, {"layer_order": 0}]
    at_output = {"level": "output", "degrade_below": 1.0}
    if not recipe.sparse.in_computed:
        at_output |= {"policy": "cached", "policy_without_text": None}
    for step in [*steps, at_output]:
        name, value = next(iter(step.items()))
        forecasts = [recipe.forecast, *(g.forecast for g in recipe.groups if g.forecast)]
        if name in ORDERS and all(getattr(each, name) <= value for each in forecasts):
            continue  # it is as low already
        try:
            after = _with(recipe, step)
        except ValueError:
            continue  # what it does not go with stays
        if after != recipe and helps(recipe, after):
            recipe = after
            kept = (each for each in lowered if not each.startswith(f"{name}="))
            lowered = (*kept, f"{name}={value}")
            yield lowered, recipe


def _with(recipe: Recipe, step: dict[str, Any]) -> Recipe:
    """The recipe with something lowered, in groups of layers that have it of their own as well.

    Raises:
        ValueError: it does not go with the rest.
    """
    (name, value), *_ = step.items()
    groups = []
    for group in recipe.groups:
        own: dict[str, Any] = {}
        if name in ORDERS and group.forecast is not None:
            low = min(value, getattr(group.forecast, name))
            own["forecast"] = replace(group.forecast, **{name: low})
        if name == "carry" and group.sparse is not None:
            own["sparse"] = replace(group.sparse, carry=value)
        groups.append(replace(group, **own))
    if name in ORDERS:
        step = {name: min(value, getattr(recipe.forecast, name))}
    return recipe.replace(**step, groups=groups)


def parse_bytes(memory: str | int) -> int | None:
    """``"4GB"``, ``"512 MiB"`` or a number of bytes; ``None`` for ``"auto"``.

    Raises:
        ValueError: it is something else.
    """
    if memory == "auto":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", str(memory))
    unit = None if found is None else UNITS.get(found[2])
    if found is None or unit is None or isinstance(memory, bool) or float(found[1]) <= 0:
        raise ValueError(
            f"memory must be 'auto', a number of bytes, or a size such as '4GB' or '512MiB', got "
            f"{memory!r}"
        )
    return int(float(found[1]) * unit)


class Budget:
    """What a model's caches may take on its device, and the recipe that keeps to it.

    Decided at a generation's first call, before it computes anything. A recipe that was lowered
    stays so until the engine is reset: generations in flight share it.

    Args:
        recipe: as the user gave it.
        memory: see :func:`parse_bytes`.
        shapes: what a call handles, of its arguments by name.
        coming: bytes of weights that are not on the device yet.
        model: how messages call it.
    """

    def __init__(
        self,
        recipe: Recipe,
        memory: str | int,
        shapes: Callable[[Mapping[str, Any]], Shapes],
        coming: Callable[[torch.device], int],
        model: str,
    ) -> None:
        self.recipe, self.limit = recipe, parse_bytes(memory)
        self._shapes, self._coming, self._model = shapes, coming, model
        self._known: dict[Hashable, Shapes] = {}
        self._note = ""
        self._now, self._lowered = recipe, NOTHING

    def choose(self, device: torch.device, inputs: Mapping[str, Any], branches: int) -> Recipe:
        """The first recipe of the ladder that fits.

        Args:
            device: that computes.
            inputs: arguments of the call, by name.
            branches: of each step.

        Raises:
            ValueError: none fits.
        """
        key = tuple((x.shape, x.dtype) for x in tree_leaves(dict(inputs)) if isinstance(x, Tensor))
        if key not in self._known:
            self._known[key] = self._shapes(inputs)
        host = HOST_SHARE * free_bytes(torch.device("cpu"))
        limit, said = self.limit, "memory"
        if limit is None:
            free = max(free_bytes(device) - self._coming(device), 0)
            limit, said = int(AUTO_SHARE * free), f"memory auto, of {in_bytes(free)} free"

        def size(recipe: Recipe) -> Bytes:
            return kept_bytes(recipe, self._known[key], device.type).times(branches)

        def helps(before: Recipe, after: Recipe) -> bool:
            a, b = size(before), size(after)
            return b.device < a.device or (b.device == a.device and b.host < a.host)

        for lowered, recipe in ladder(self._now, device.type, helps, self._lowered):
            kept = size(recipe)
            if kept.device <= limit and kept.host <= host:
                self._now, self._lowered = recipe, lowered
                self._say(f"{said}: {in_bytes(limit)}", kept, size(self.recipe), branches)
                return recipe
        raise ValueError(
            f"{said} {in_bytes(limit)} is less than any setting of recipe {self.recipe.name} "
            f"keeps: {in_bytes(kept.device)} with {', '.join(lowered)}; take another recipe, fewer "
            "pixels or frames, or recipe 'lossless', which keeps nothing"
        )

    def reset(self) -> None:
        """The next generation may have the recipe as it was given again."""
        self._now, self._lowered = self.recipe, NOTHING

    def _say(self, limit: str, kept: Bytes, given: Bytes, branches: int) -> None:
        sizes = [f"about {in_bytes(kept.device)} on the device"]
        sizes += [f"{in_bytes(kept.host)} in host memory"] if kept.host else []
        note = f"{limit}; keeps {' and '.join(sizes)}"
        note += f" for {branches} branches" if branches > 1 else ""
        if self._lowered:
            before = in_bytes(given.device + given.host)
            note += f", with {', '.join(self._lowered)} (as given: {before})"
        if note != self._note:
            self._note = note
            log.log(logging.WARNING if self._lowered else logging.INFO, "%s: %s", self._model, note)

    def notes(self) -> list[str]:
        """What the report should say."""
        return [self._note] if self._note else []


def advise(error: BaseException | None, recipe: Recipe, device: int, host: int) -> None:
    """Add to an error that the memory is out what could be lowered.

    Args:
        error: that is on its way; others than :class:`torch.OutOfMemoryError` stay as they are.
        recipe: of the model.
        device: bytes that the engine keeps there, like ``host``.
    """
    if not isinstance(error, torch.OutOfMemoryError):
        return
    steps = [lowered[-1] for lowered, _ in ladder(recipe) if lowered]
    held = f"FlashOmni kept {in_bytes(device)} on the device by then"
    held += f" and {in_bytes(host)} in host memory" if host else ""
    if device < SMALL:
        text = "little of it is the engine's: offload weights (docs/memory.md), or fewer pixels"
    elif steps:
        text = f"lower it by accelerate(..., memory='auto'), or one by one: {', '.join(steps)}"
    else:
        text = "no setting keeps less: offload weights (docs/memory.md), or fewer pixels"
    error.add_note(f"{held}; {text}")
