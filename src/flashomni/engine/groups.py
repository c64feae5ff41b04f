"""Groups of layers with a schedule, a forecast, a policy or sparse settings of their own.

Where the layers of a model change at different pace (dual and single blocks, the first and the
last), some may be computed more often than others: PAB (arXiv 2408.12588), SmoothCache (2411.10510)
and BlockDance choose steps by kind of layer, offline. And where the attention of some matters less,
it may be sparser there: SpargeAttn (2502.18137) tunes its thresholds layer by layer.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashomni.engine.recipe_parts import ForecastSettings
from flashomni.engine.schedules import Schedule
from flashomni.engine.sparse_settings import SparseSettings
from flashomni.policies import Policy

if TYPE_CHECKING:
    from flashomni.engine.recipe import Recipe

Layers = str | tuple[int | str, ...]


PARTS: dict[str, type] = {
    "schedule": Schedule,
    "forecast": ForecastSettings,
    "policy": Policy,
    "sparse": SparseSettings,
}
SHARED = ("token_order", "symbols")  # of the whole sequence, or of all layers


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers that have parts of their own; what is ``None`` is the recipe's.

    Args:
        layers: ``"0:19"``, a range of their positions as Python slices; a pattern of their names
            (``"single_transformer_blocks.*"``); or a list of positions, ranges and patterns.
        schedule: which steps compute them; it must plan before.
        forecast: how they are carried forward.
        policy: chooses their symbols.
        sparse: what is done with these; token order and file of symbols are the recipe's.

    Raises:
        ValueError: a value is not allowed.
    """

    layers: Layers
    schedule: Schedule | None = None
    forecast: ForecastSettings | None = None
    policy: Policy | None = None
    sparse: SparseSettings | None = None

    def __post_init__(self) -> None:
        chosen = (self.layers,) if isinstance(self.layers, (str, int)) else self.layers
        good = isinstance(chosen, (list, tuple)) and bool(chosen)
        if not good or not all(_is_choice(choice) for choice in chosen):
            raise ValueError(
                "layers must be a range ('0:19'), a pattern of names, or a list of positions and "
                f"such, got {self.layers!r}"
            )
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        for part, kind in PARTS.items():
            given = getattr(self, part)
            if given is not None and not isinstance(given, kind):
                raise ValueError(f"{part} of a group must be a {kind.__name__}, got {given!r}")
        if not self.own:
            raise ValueError(f"a group must have one of {', '.join(PARTS)}")
        if self.schedule is not None:
            refuse_late(self.schedule)
        if self.forecast is not None and self.forecast.level == "output":
            raise ValueError("level of a group must be 'layers' or 'auto', got 'output'")

    @property
    def own(self) -> dict[str, Any]:
        """The parts that are not the recipe's."""
        return {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}

    @property
    def apart(self) -> bool:
        """Whether its layers are computed in other steps, or forecast in another way."""
        return self.schedule is not None or self.forecast is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; what is the recipe's is left out."""
        found: dict[str, Any] = {"layers": self.layers}
        for part, value in self.own.items():
            whole = isinstance(value, (Schedule, Policy))
            found[part] = value.to_dict() if whole else dataclasses.asdict(value)
        return found

    def select(self, names: Sequence[str]) -> set[int]:
        """Positions of its layers.

        Args:
            names: of all layers of a model, in order.

        Raises:
            ValueError: something selects no layer of this model.
        """
        found: set[int] = set()
        chosen = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        for choice in chosen:
            picked = _pick(choice, names)
            if not picked:
                raise ValueError(
                    f"layers {choice!r} of a group selects none of this model's {len(names)} "
                    f"layers, {names[0]} to {names[-1]}"
                )
            found |= picked
        return found


def check_groups(recipe: Recipe) -> None:
    """Raise ``ValueError`` for groups whose parts do not go with the recipe's."""
    for group in recipe.groups:
        sparse, policy = group.sparse or recipe.sparse, group.policy or recipe.policy
        sparse.check_policies(policy)
        for name in SHARED:
            mine, ours = getattr(sparse, name), getattr(recipe.sparse, name)
            if mine != ours:
                raise ValueError(f"{name} of a group must be the recipe's, {ours!r}, got {mine!r}")
        if recipe.forecast.level == "output" and policy.name != "cached" and not sparse.in_computed:
            raise ValueError(
                "forecast level 'output' leaves out the whole model, so a group's policy must be "
                f"'cached', got {policy.name!r}, or used in computed steps (sparse.in_computed)"
            )


def refuse_late(schedule: Schedule) -> None:
    """Raise ``ValueError`` for a schedule that does not plan: groups could not follow it."""
    if schedule.decides or schedule.plan(28, 0) is None:
        raise ValueError(
            f"schedule of a recipe with groups must plan before; {schedule.name!r} decides late"
        )


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, (int, str)) and not isinstance(choice, bool) and choice != ""


def _pick(choice: int | str, names: Sequence[str]) -> set[int]:
    everything = range(len(names))
    if isinstance(choice, int):
        return {choice % len(names)} if -len(names) <= choice < len(names) else set()
    start, colon, stop = choice.partition(":")
    if colon and all(part == "" or part.lstrip("-").isdecimal() for part in (start, stop)):
        return set(everything[slice(int(start or 0), int(stop) if stop else None)])
    return {i for i in everything if fnmatch.fnmatchcase(names[i], choice)}


@dataclass(frozen=True)
class Division:
    """The layers of one model, divided.

    Args:
        recipes: of each group; of those that no group names, at the end, the recipe itself.
        of: which of them each layer follows.
    """

    recipes: tuple[Recipe, ...]
    of: tuple[int, ...]

    @classmethod
    def make(cls, recipe: Recipe, names: Sequence[str]) -> Division:
        """Divide the layers ``names``.

        Raises:
            ValueError: a group has no layer, a layer is in two groups, or the schedule computes
                all layers always.
        """
        ends = recipe.schedule.front + recipe.schedule.back
        if ends >= len(names):
            raise ValueError(
                f"front + back of schedule {recipe.schedule.name} must leave some of the model's "
                f"{len(names)} layers, got {ends}"
            )
        taken: dict[int, int] = {}
        recipes = []
        for number, group in enumerate(recipe.groups):
            for index in sorted(group.select(names)):
                if index in taken:
                    other = recipe.groups[taken[index]].layers
                    raise ValueError(
                        f"layer {names[index]} is in two groups, {other!r} and {group.layers!r}"
                    )
                taken[index] = number
            own = group.own
            if not recipe.at_output:
                own["forecast"] = _of_layers(own.get("forecast", recipe.forecast))
            recipes.append(dataclasses.replace(recipe, **own, groups=()))
        if len(taken) < len(names) or not recipes:
            apart = bool(recipe.groups) and not recipe.at_output
            forecast = _of_layers(recipe.forecast) if apart else recipe.forecast
            recipes.append(dataclasses.replace(recipe, forecast=forecast, groups=()))
        return cls(tuple(recipes), tuple(taken.get(i, len(recipes) - 1) for i in range(len(names))))


def _of_layers(forecast: ForecastSettings) -> ForecastSettings:
    """The same where a group's layers are cached: never the output of the whole model."""
    return dataclasses.replace(forecast, level="layers")


def load_groups(value: Any, load: Any) -> tuple[Group, ...]:
    """Groups of JSON values; objects stay.

    Args:
        value: a list.
        load: ``load(part, value)`` gives a schedule or forecast.

    Raises:
        ValueError: an entry is no group.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"groups must be a list, got {value!r}")
    return tuple(entry if isinstance(entry, Group) else _load(entry, load) for entry in value)


def _load(entry: Any, load: Any) -> Group:
    good = isinstance(entry, Mapping) and "layers" in entry and set(entry) - {"layers"}
    if not good or not set(entry) <= {"layers", *PARTS}:
        got = sorted(entry) if isinstance(entry, Mapping) else entry
        raise ValueError(
            f"a group has layers, and of {', '.join(PARTS)} what is not the recipe's; got {got!r}"
        )
    parts = {key: load(key, entry[key]) for key in PARTS if entry.get(key) is not None}
    try:
        return Group(layers=entry["layers"], **parts)
    except ValueError as error:
        raise ValueError(f"groups: {error}") from error
