"""Sparse attention in the steps that compute, by layers, where that is cheaper than other ways.

A second of a generation can be saved in two ways: by leaving out a step more, or by leaving out
attention in the steps that stay. What the first costs is known from planning: the dB between the
plans of K and K - 1 computed steps, over the seconds of a step of the accelerated pipeline. The
second is measured: what kinds save and lose in all layers, what some of them lose in runs of
layers; then the best kind for each run is chosen, tried on the real output and the clock, and cut
back if it loses more than it should. S_q and tau_q say what Dispatch steps compute; a forecast
output leaves out those steps whole, so there is nothing for them to save.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from flashomni.engine import Recipe
from flashomni.tuning.layerwise import (
    Kind,
    Option,
    Run,
    bisect,
    corners,
    options_of,
    surplus,
)

COMPUTED = {"in_computed": True, "dense_steps": 2, "degrade_below": 1.0}
ANEW = {**COMPUTED, "choose_at": "computed"}
HELD = {**COMPUTED, "choose_at": [2], "carry": "extrapolate", "summaries": 4}


def _topk(density: float, sparse: Mapping[str, Any], resolution: int = 0) -> dict[str, Any]:
    rule = {"diagonal": True, "text_rows": True, "resolution": resolution}
    return {"policy": {"name": "topk", "q_density": 1.0, "kv_density": density, **rule},
            "sparse": dict(sparse)}  # fmt: skip


# Densities, with a summary of what is skipped or without, tau_kv, columns kept between refreshes
# with what they miss carried forward. The first four are of different families.
OPTIONS: tuple[dict[str, Any], ...] = (
    _topk(0.5, ANEW),
    _topk(0.25, {**ANEW, "summaries": 4}),
    {"policy": {"name": "flashomni", "tau_q": 0.0, "tau_kv": 0.1, "power": 0.0}, "sparse": ANEW},
    _topk(0.25, {**HELD, "refresh": 3}, 8),
    _topk(0.25, {**HELD, "refresh": 2}, 8),
    _topk(0.35, {**HELD, "refresh": 4}, 8),
    _topk(0.5, {**HELD, "refresh": 4}, 8),
    _topk(0.15, {**HELD, "refresh": 3}, 8),
)
FAMILIES = 4  # the others are tried where one of these saves time
NOISE = 0.02  # of a generation's seconds: what saves less saves nothing
PROBED = 2  # kinds that are measured in runs of layers
REPAIRS = 3
HOPELESS = 6.0  # dB that a prompt loses beyond any hope: no other prompt makes up for it
Groups = Sequence[Mapping[str, Any]]
Useless = Callable[[list[float], float], bool]


@dataclass(frozen=True)
class Found:
    """What a recipe gave on tuning prompts.

    Attributes:
        levels: dB of the final latents against the dense run, by prompt.
        apart: dB against the plan without sparse attention, by prompt.
        seconds: the least of a generation.
        skipped: attention that was left out in computed steps by layer, FLOPs.
    """

    levels: list[float]
    apart: list[float]
    seconds: float
    skipped: list[float]


class Measure(Protocol):
    """Runs recipes; the plan without sparse attention comes first."""

    def run(self, recipe: Recipe, useless: Useless) -> Found:
        """On tuning prompts, timed.

        Behind each prompt it asks whether dB and least seconds so far are of no use; then the other
        prompts are left out.
        """

    def apart(self, recipe: Recipe) -> float:
        """dB against the plan on the first prompt, once and not timed."""


@dataclass(frozen=True)
class Tried:
    """Sparse attention in some layers.

    Attributes:
        groups: of the recipe, JSON values.
        saved: seconds of a generation.
        loss_db: of the final latents.
        price_db: what as many seconds cost where steps are left out instead.
        predicted_db: surplus that was expected of a choice by layers.
    """

    groups: tuple[Mapping[str, Any], ...]
    saved: float
    loss_db: float
    price_db: float
    predicted_db: float | None = None

    @property
    def surplus(self) -> float:
        """dB that are won over leaving out steps."""
        return self.price_db - self.loss_db

    @property
    def words(self) -> str:
        """In short, for tables."""
        where = "; ".join(f"{in_short(g)} in {_ranges(g['layers'])}" for g in self.groups)
        return f"{where}: {self.saved:+.3f} s for {self.loss_db:.2f} dB, price {self.price_db:.2f}"


@dataclass(frozen=True)
class Spent:
    """What sparse attention is worth at one number of computed steps.

    Attributes:
        tried: all that was measured.
        chosen: what pays, if anything does; not yet validated.
        seconds: of a generation without it.
        errors: ``(start, stop, errors)`` of the runs of layers that were measured: squared, over
            the plan's own, of the kinds numbered in ``probed``.
        probed: places in ``tried``.
        price: dB that a second costs where steps are left out.
    """

    tried: tuple[Tried, ...]
    chosen: Tried | None
    seconds: float
    errors: tuple[tuple[int, int, tuple[float, ...]], ...] = ()
    probed: tuple[int, ...] = ()
    price: float = 0.0

    @property
    def by_layer(self) -> str:
        """What kinds lose in the runs of layers that were measured, a line for tables."""
        found = []
        for place, number in enumerate(self.probed):
            each = ", ".join(f"{a}:{b} {errors[place]:.2g}" for a, b, errors in self.errors)
            found.append(f"{in_short(self.tried[number].groups[0])}: {each}")
        return "; ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`load` gives it back."""
        return asdict(self)

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Spent:
        def tried(each: Mapping[str, Any]) -> Tried:
            return Tried(**{**each, "groups": tuple(each["groups"])})

        chosen = value["chosen"]
        errors = tuple((start, stop, tuple(each)) for start, stop, each in value.get("errors", ()))
        return cls(
            tuple(map(tried, value["tried"])), None if chosen is None else tried(chosen),
            value["seconds"], errors, tuple(value.get("probed", ())),
            value.get("price", 0.0),
        )  # fmt: skip


def in_short(group: Mapping[str, Any]) -> str:
    """The kind of a group, in a few words."""
    policy, sparse = group["policy"], group["sparse"]
    amount = policy.get("kv_density", policy.get("tau_kv"))
    words = f"{policy['name']} {amount:g}"
    if sparse.get("summaries"):
        words += f", {sparse['summaries']} means a block"
    if sparse.get("carry", "off") != "off":
        words += f", refresh {sparse['refresh']}"
    return words


def _ranges(layers: str | Sequence[str]) -> str:
    if layers == ":":
        return "all layers"
    return f"layers {layers if isinstance(layers, str) else ', '.join(layers)}"


def sparsely(recipe: Recipe, groups: Groups) -> Recipe:
    """A recipe with these groups, in their order of tokens."""
    if not groups:
        return recipe.replace(groups=[])
    order = groups[0]["sparse"].get("token_order", "raster")
    return recipe.replace(groups=list(groups), token_order=order)


def groups_of(
    picks: Sequence[int | None], runs: Sequence[tuple[int, int]], options: Sequence[Mapping]
) -> tuple[dict[str, Any], ...]:
    """Groups of a recipe: a group a kind, neighbouring runs of layers put together."""
    ranges: dict[int, list[list[int]]] = {}
    for pick, (start, stop) in zip(picks, runs, strict=True):
        if pick is None:
            continue
        mine = ranges.setdefault(pick, [])
        if mine and mine[-1][1] == start:
            mine[-1][1] = stop
        else:
            mine.append([start, stop])
    found = []
    for pick in sorted(ranges):
        every = ranges[pick] == [[0, runs[-1][1]]]
        layers = [":" if every else f"{start}:{stop}" for start, stop in ranges[pick]]
        found.append({"layers": layers[0] if len(layers) == 1 else layers, **options[pick]})
    return tuple(found)


def spend(
    measure: Measure,
    recipe: Recipe,
    num_layers: int,
    price: float,
    options: Sequence[Mapping[str, Any]] = OPTIONS,
    layer_runs: int = 32,
    order: str = "raster",
) -> Spent:
    """Find which layers' attention may be sparse, and how.

    Args:
        measure: runs recipes.
        recipe: at the level of the output.
        num_layers: of the model.
        price: dB that a second costs where steps are left out.
        options: policies and sparse settings to try.
        layer_runs: generations that measure runs of layers; 0 tries kinds in all layers alone.
        order: of tokens, where attention is sparse.
    """
    return _Spender(measure, recipe, price, num_layers, order).spend(options, layer_runs)


class _Spender:
    def __init__(
        self, measure: Measure, recipe: Recipe, price: float, num_layers: int, order: str
    ) -> None:
        self.measure, self.recipe, self.price = measure, recipe, price
        self.num_layers, self.order = num_layers, order
        self.plain = measure.run(recipe, lambda levels, seconds: False)
        self.tried: list[Tried] = []

    def spend(self, options: Sequence[Mapping[str, Any]], layer_runs: int) -> Spent:
        """See :func:`spend`."""
        noise = NOISE * self.plain.seconds
        kinds, places = list[Kind](), list[int]()
        for number, option in enumerate(options):
            if number == FAMILIES and not kinds:
                break
            kind = self._whole(option)
            if kind.saved > noise:
                kinds.append(kind)
                places.append(number)
        runs, probed = list[Run](), list[int]()
        if kinds and layer_runs and self.num_layers > 1:
            mine = [self._ordered(options[number]) for number in places]
            probed, runs = self._by_layers(kinds, mine, layer_runs)
        paying = [each for each in self.tried if each.surplus > 0 and each.saved > noise]
        best = max(paying, key=lambda each: each.surplus, default=None)
        errors = tuple((run.start, run.stop, run.errors) for run in runs)
        at = tuple(places[kind] for kind in probed)
        return Spent(tuple(self.tried), best, self.plain.seconds, errors, at, self.price)

    def _ordered(self, option: Mapping[str, Any]) -> dict[str, Any]:
        sparse = {**option["sparse"], "token_order": self.order}
        return {"policy": option["policy"], "sparse": sparse}

    def _attempt(
        self, groups: Sequence[Mapping[str, Any]], predicted: float | None = None
    ) -> Found:
        levels, seconds = self.plain.levels, self.plain.seconds

        def loss(found: Sequence[float]) -> float:
            return statistics.fmean(a - b for a, b in zip(levels, found, strict=False))

        def useless(found: list[float], taken: float) -> bool:
            option = Option(seconds - taken, max(10 ** (loss(found) / 10) - 1, 0.0))
            return taken >= seconds or self._hope(option) < -HOPELESS

        found = self.measure.run(sparsely(self.recipe, groups), useless)
        saved = seconds - found.seconds
        price = self.price * saved
        self.tried.append(Tried(tuple(groups), saved, loss(found.levels), price, predicted))
        return found

    def _hope(self, option: Option) -> float:
        return max(surplus(self.price, each.saved, each.error) for each in option.hopes)

    def _whole(self, option: Mapping[str, Any]) -> Kind:
        try:
            found = self._attempt([{"layers": ":", **self._ordered(option)}])
        except NotImplementedError:  # nobody knows where this model's tokens lie
            if self.order == "raster":
                raise
            self.order = "raster"
            found = self._attempt([{"layers": ":", **self._ordered(option)}])
        own = zip(self.plain.levels, found.apart, strict=False)
        errors = [_over(level, apart) for level, apart in own]
        total = sum(found.skipped)
        if len(found.skipped) == self.num_layers and total > 0:
            shares = tuple(each / total for each in found.skipped)
        else:
            shares = (1 / self.num_layers,) * self.num_layers
        return Kind(self.tried[-1].saved, statistics.fmean(errors), shares, errors[0])

    def _by_layers(
        self, kinds: Sequence[Kind], options: Sequence[Mapping[str, Any]], budget: int
    ) -> tuple[list[int], list[Run]]:
        """Measure runs of layers, choose, and try the choice. Returns kinds probed, and runs."""
        hopes = [self._hope(kind) for kind in kinds]
        ranked = sorted(range(len(kinds)), key=lambda number: -hopes[number])
        probed = [number for number in ranked if hopes[number] > 0][:PROBED]
        if not probed:
            return [], []

        def probe(number: int, start: int, stop: int) -> float:
            group = {"layers": f"{start}:{stop}", **options[number]}
            apart = self.measure.apart(sparsely(self.recipe, [group]))
            kind = kinds[number]  # one prompt tells a share of what it loses in all layers
            usual = kind.error / kind.first if kind.first > 0 else 1.0
            return usual * _over(self.plain.levels[0], apart)

        runs = bisect(kinds, probed, probe, budget, self.price)
        path = corners(options_of(kinds, probed, runs))
        where = [(run.start, run.stop) for run in runs]
        slower = worse = 1.0
        path = [choice for choice in path if choice.saved > NOISE * self.plain.seconds]
        for _ in range(1 + REPAIRS):
            values = [choice.surplus(self.price, slower, worse) for choice in path]
            if max(values, default=0.0) <= 0:
                break
            place = values.index(max(values))
            best, path = path[place], path[:place]  # next without the layers that lose most
            groups = groups_of(best.picks, where, options)
            got = next((each for each in self.tried if each.groups == groups), None)
            if got is None:  # else a kind in all layers, as it was measured before
                self._attempt(groups, values[place])
                got = self.tried[-1]
            if got.surplus >= values[place]:
                break
            slower = min(got.saved / best.saved, slower)
            worse = max((10 ** (got.loss_db / 10) - 1) / max(best.error, 1e-12), worse)
        return probed, runs


def _over(level: float, apart: float) -> float:
    """A squared error, by its dB, over the plan's own."""
    return float(10 ** ((level - apart) / 10))
