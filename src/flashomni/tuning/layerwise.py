"""Which layers' attention is sparse, and how: an exact choice, and the errors it is made of.

What sparse attention loses in one layer is nearly independent of what it loses in another, so that
squares add up to first order: S seconds and an error of E times the plan's own are worth
``price * S - 10 log10(1 + E)`` dB. That is convex in (S, E), so the best of all combinations lies
at a corner of their convex hull. S and E are sums over layers, and the corners of a sum are found
layer by layer: the edges of each layer's own hull, the cheapest error by second first. What is
exponential in the number of layers is a sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# At best some layers save half of the seconds of all for a thirtieth of the error.
HALF, LITTLE = 0.5, 1 / 30


@dataclass(frozen=True)
class Option:
    """One kind of sparse attention in some layers.

    Attributes:
        saved: seconds of a generation.
        error: squared, over the squared error of the plan without it.
    """

    saved: float
    error: float

    @property
    def hopes(self) -> tuple[Option, ...]:
        """What could come of it if a part of its layers did nearly no harm."""
        return self, Option(HALF * self.saved, LITTLE * self.error)


def surplus(price: float, saved: float, error: float) -> float:
    """dB that are won over leaving out steps, of which a second costs ``price``."""
    return price * saved - 10 * math.log10(1 + error)


@dataclass(frozen=True)
class Choice:
    """A kind for each run of layers, ``None`` for dense ones, and what they save and lose."""

    picks: tuple[int | None, ...]
    saved: float
    error: float

    def surplus(self, price: float, slower: float = 1.0, worse: float = 1.0) -> float:
        """dB that are won over leaving out steps.

        Args:
            price: dB that a second costs there.
            slower: a measured share of the seconds that were predicted.
            worse: likewise of the error.
        """
        return surplus(price, self.saved * slower, self.error * worse)


def corners(options: Sequence[Sequence[Option]]) -> list[Choice]:
    """All combinations that can be best at any price, from none on, each saving more.

    Args:
        options: of each run of layers; each is used there or not at all.
    """
    edges: list[tuple[float, int, int, float, float]] = []
    for place, mine in enumerate(options):
        hull: list[tuple[float, float, int | None]] = [(0.0, 0.0, None)]
        ranked = sorted(range(len(mine)), key=lambda i: (mine[i].saved, -mine[i].error))
        for index in ranked:
            saved, error = mine[index].saved, max(mine[index].error, 0.0)
            if saved <= 0.0:
                continue
            while _bends_down(hull, saved, error):
                hull.pop()
            hull.append((saved, error, index))
        for (s0, e0, _), (s1, e1, best) in pairwise(hull):
            assert best is not None
            edges.append(((e1 - e0) / (s1 - s0), place, best, s1 - s0, e1 - e0))
    picks: list[int | None] = [None] * len(options)
    found = [Choice(tuple(picks), 0.0, 0.0)]
    for _, place, index, saved, error in sorted(edges):
        picks[place] = index
        last = found[-1]
        found.append(Choice(tuple(picks), last.saved + saved, last.error + error))
    return found


def _bends_down(hull: list[tuple[float, float, int | None]], saved: float, error: float) -> bool:
    """Whether the hull's end lies on or above the line to a point that saves as much or more."""
    s1, e1, _ = hull[-1]
    if len(hull) == 1:
        return False  # nothing is always allowed
    if error <= e1 or saved <= s1:
        return error <= e1
    s0, e0, _ = hull[-2]
    return (e1 - e0) * (saved - s1) >= (error - e1) * (s1 - s0)


@dataclass(frozen=True)
class Kind(Option):
    """A kind of sparse attention in all layers, as it was measured.

    Attributes:
        shares: of the attention that it skips, by layer.
        first: the error of the first prompt, which runs of layers are measured on.
    """

    shares: tuple[float, ...]
    first: float


@dataclass(frozen=True)
class Run:
    """Neighbouring layers that are sparse alike, ``start`` to before ``stop``.

    Attributes:
        errors: of the kinds that were measured in them, squared as :attr:`Option.error` is.
    """

    start: int
    stop: int
    errors: tuple[float, ...]

    def __len__(self) -> int:
        return self.stop - self.start


# Measures the error of a kind that is used in some layers: its number, start and stop.
Probe = Callable[[int, int, int], float]


def bisect(
    kinds: Sequence[Kind], probed: Sequence[int], probe: Probe, budget: int, price: float
) -> list[Run]:
    """Runs of layers, short where errors are large.

    What is known of all layers is halved again and again, the run with the largest error first,
    until generations are spent, every run is a layer, or the best that could come of it pays
    nothing.

    Args:
        kinds: what was measured of all layers.
        probed: those of them that are measured in runs of layers.
        probe: measures one.
        budget: how often.
        price: dB that a second costs where steps are left out.
    """
    layers = len(kinds[0].shares)
    runs = [Run(0, layers, tuple(kinds[k].error for k in probed))]
    while budget >= 2 * len(probed):
        long = [run for run in runs if len(run) > 1]
        hopeful = corners([_hopes(kinds, probed, run) for run in runs])
        if not long or max(choice.surplus(price) for choice in hopeful) <= 0:
            break
        widest = max(long, key=lambda run: max(run.errors))
        middle = (widest.start + widest.stop) // 2
        halves = [
            Run(start, stop, tuple(probe(k, start, stop) for k in probed))
            for start, stop in ((widest.start, middle), (middle, widest.stop))
        ]
        budget -= 2 * len(probed)
        place = runs.index(widest)
        runs[place : place + 1] = halves
    return runs


def options_of(
    kinds: Sequence[Kind], probed: Sequence[int], runs: Sequence[Run]
) -> list[list[Option]]:
    """What each kind saves and loses in each run of layers.

    A kind that was not measured by layers loses where the first that was does. Where all layers
    lose more together than the sum of the runs, as they do if errors point into one direction,
    the runs are charged with that.

    Returns:
        Of each run, an :class:`Option` by kind.
    """
    sums = [sum(run.errors[i] for run in runs) for i in range(len(probed))]
    found = list[list[Option]]()
    for run in runs:
        mine = []
        for number, kind in enumerate(kinds):
            place = probed.index(number) if number in probed else 0
            spread = run.errors[place] / sums[place] if sums[place] > 0 else 0.0
            whole = max(kind.error, sums[place]) if number in probed else kind.error
            saved = kind.saved * sum(kind.shares[run.start : run.stop])
            mine.append(Option(saved, spread * whole))
        found.append(mine)
    return found


def _hopes(kinds: Sequence[Kind], probed: Sequence[int], run: Run) -> list[Option]:
    """What a run's kinds may come to."""
    found = list[Option]()
    for place, number in enumerate(probed):
        saved = kinds[number].saved * sum(kinds[number].shares[run.start : run.stop])
        option = Option(saved, run.errors[place])
        found += option.hopes if len(run) > 1 else (option,)
    return found
