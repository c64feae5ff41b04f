"""Sparse attention in the steps that compute, by layers, where that is cheaper than other ways.

A second of a generation can be saved in two ways: by leaving out a step more, or by leaving out
attention in the steps that stay. What the first costs is known from planning: the dB between the
plans of K and K - 1 computed steps, over the seconds of a step. The second is measured, on the real
output and the clock, for all layers and then for each third of them; it is taken where the same
seconds cost less. S_q and tau_q say what Dispatch steps compute; a forecast output leaves out
those steps whole, so there is nothing for them to save.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from flashomni.engine import Recipe

COMPUTED = {"in_computed": True, "dense_steps": 2, "degrade_below": 1.0}
ANEW = {**COMPUTED, "choose_at": "computed"}
# Density, density with a summary of what is skipped, tau_kv, and columns kept between refreshes.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"policy": {"name": "topk", "kv_density": 0.5}, "sparse": ANEW},
    {"policy": {"name": "topk", "kv_density": 0.25}, "sparse": {**ANEW, "summaries": 1}},
    {"policy": {"name": "flashomni", "tau_q": 0.0, "tau_kv": 0.1, "power": 0.0}, "sparse": ANEW},
    {
        "policy": {"name": "topk", "kv_density": 0.25},
        "sparse": {**COMPUTED, "choose_at": [2], "carry": "hold", "refresh": 3},
    },
)
NOISE = 0.02  # of a generation's seconds: what saves less saves nothing
HOPEFUL = 2  # kinds that are tried on thirds of the layers
HOPELESS = 6.0  # dB that a prompt loses beyond the price: no other prompt makes up for it
Useless = Callable[[list[float], float], bool]
# Measures a recipe: dB of the final latents by prompt, and the least seconds. Behind each prompt it
# asks whether these so far are of no use; then the others are left out.
Run = Callable[[Recipe, Useless], tuple[list[float], float]]


@dataclass(frozen=True)
class Tried:
    """Sparse attention in some layers.

    Attributes:
        groups: of the recipe, JSON values.
        saved: seconds of a generation.
        loss_db: of the final latents.
        price_db: what as many seconds cost where steps are left out instead.
    """

    groups: tuple[Mapping[str, Any], ...]
    saved: float
    loss_db: float
    price_db: float

    @property
    def surplus(self) -> float:
        """dB that are won over leaving out steps."""
        return self.price_db - self.loss_db

    @property
    def words(self) -> str:
        """In short, for tables."""
        where = ", ".join(f"{g['policy']['name']} in layers {g['layers']}" for g in self.groups)
        return f"{where}: {self.saved:+.3f} s for {self.loss_db:.2f} dB, price {self.price_db:.2f}"


@dataclass(frozen=True)
class Spent:
    """What sparse attention is worth at one number of computed steps.

    Attributes:
        tried: all that was measured.
        chosen: what pays, if anything does; not yet validated.
        seconds: of a generation without it.
    """

    tried: tuple[Tried, ...]
    chosen: Tried | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`load` gives it back."""
        return asdict(self)

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Spent:
        tried = tuple(Tried(**{**each, "groups": tuple(each["groups"])}) for each in value["tried"])
        chosen = value["chosen"]
        if chosen is not None:
            chosen = Tried(**{**chosen, "groups": tuple(chosen["groups"])})
        return cls(tried, chosen, value["seconds"])


def thirds(num_layers: int) -> list[str]:
    """The layers in three runs, as groups of a recipe name them."""
    ends = sorted({round(num_layers * part / 3) for part in range(4)})
    return [f"{a}:{b}" for a, b in pairwise(ends)]


def spend(
    run: Run,
    recipe: Recipe,
    num_layers: int,
    price: float,
    options: Sequence[Mapping[str, Any]] = OPTIONS,
) -> Spent:
    """Find which layers' attention may be sparse.

    Args:
        run: measures a recipe.
        recipe: at the level of the output.
        num_layers: of the model.
        price: dB that a second costs where steps are left out.
        options: policies and sparse settings to try.
    """
    levels, seconds = run(recipe, lambda levels, seconds: False)
    tried: list[Tried] = []

    def judged(groups: tuple[Mapping[str, Any], ...], found: list[float], taken: float) -> Tried:
        loss = statistics.fmean(a - b for a, b in zip(levels, found, strict=False))
        return Tried(groups, seconds - taken, loss, price * (seconds - taken))

    def attempt(*groups: Mapping[str, Any], hopeless: float = math.inf) -> Tried:
        def useless(found: list[float], taken: float) -> bool:
            return taken >= seconds or judged(groups, found, taken).surplus < -hopeless

        found = run(recipe.replace(groups=list(groups)), useless)
        tried.append(judged(groups, *found))
        return tried[-1]

    whole = [attempt({"layers": ":", **option}) for option in options]
    hopeful = [each for each in whole if each.saved > NOISE * seconds]
    hopeful = sorted(hopeful, key=lambda each: -each.surplus)[:HOPEFUL]
    taken: list[Mapping[str, Any]] = []
    for layers in thirds(num_layers) if hopeful else ():
        found = [
            attempt({**each.groups[0], "layers": layers}, hopeless=HOPELESS) for each in hopeful
        ]
        best = max(found, key=lambda each: each.surplus)
        if best.surplus > 0:
            taken.append(best.groups[0])
    if len(taken) > 1:
        attempt(*taken)
    paying = [e for e in tried if e.surplus > 0 and e.saved > NOISE * seconds]
    return Spent(tuple(tried), max(paying, key=lambda e: e.surplus, default=None), seconds)
