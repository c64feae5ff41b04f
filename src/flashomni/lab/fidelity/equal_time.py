"""Methods against lines of rivals, interpolated at the methods' own measured time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flashomni.lab.fidelity.comparison import Comparison, Summed, mean_and_error, shared


@dataclass(frozen=True)
class Interpolated:
    """A method against a line of rivals at its own time: PSNR, in dB, picture by picture.

    A line is one rival with several settings. Those that another one of the line beats in mean PSNR
    and takes no longer are left out; between two, each picture's PSNR is on a straight line over
    time; slower than all, the best one stands.

    Args:
        method: its name.
        line: what the rivals' names have in common.
        seconds: of the method.
        rivals: names of the one or two settings whose times are next to it.
        gain_db: mean of the differences, ``error_db`` its standard error over prompts.
        worst_db: lowest difference.
        worst_psnr_db: lowest PSNR of the method less the line's lowest.
    """

    method: str
    line: str
    seconds: float
    rivals: tuple[str, ...]
    gain_db: float
    error_db: float | None
    worst_db: float
    worst_psnr_db: float

    def __str__(self) -> str:
        error = "" if self.error_db is None else f" +- {self.error_db:.2f}"
        return (
            f"{self.method} - {self.line} at {self.seconds:.3f} s: {self.gain_db:+.2f} dB{error}, "
            f"worst {self.worst_db:+.2f}, of worsts {self.worst_psnr_db:+.2f} "
            f"({' '.join(self.rivals)})"
        )


@dataclass(frozen=True)
class Equal:
    """A row of a CSV: one :class:`Interpolated` and where it was measured."""

    model: str
    method: str
    line: str
    device: str
    seconds: float
    rivals: str
    gain_db: float
    error_db: float | str
    worst_db: float
    worst_psnr_db: float
    prompts: int
    seeds: int
    commit: str = ""

    @classmethod
    def of(cls, found: Interpolated, model: str, comparison: Comparison) -> Equal:
        """Of one that :func:`at_equal_time` found."""
        row = next(row for row in comparison.rows if row.method == found.method)
        return cls(
            model, found.method, found.line, row.device, found.seconds, " ".join(found.rivals),
            found.gain_db, "" if found.error_db is None else found.error_db, found.worst_db,
            found.worst_psnr_db, row.prompts, row.seeds, row.commit,
        )  # fmt: skip


def line_of(name: str) -> str:
    """What the settings of one rival have in common: ``steps=14`` is of the line ``steps``."""
    return re.split("[:=]", name, maxsplit=1)[0]


def at_equal_time(
    comparison: Comparison, methods: Sequence[str], rivals: Sequence[str] = ("peers", "stock")
) -> list[Interpolated]:
    """Methods against every line of rivals, each at its own time.

    Args:
        comparison: with all of them.
        methods: which.
        rivals: families, or names of methods. A line that is nowhere as fast is left out.

    Raises:
        ValueError: a method and the settings of a line that are next to it in time have no picture
            of the same prompt and seed.
    """
    sound = [row for row in comparison.rows if isinstance(row.psnr_db, float)]
    lines: dict[str, list[Summed]] = {}
    for row in sorted(sound, key=lambda row: (row.seconds, -float(row.psnr_db))):
        if row.method in methods or not {row.family, row.method} & set(rivals):
            continue
        line = lines.setdefault(line_of(row.method), [])
        if not line or float(row.psnr_db) > float(line[-1].psnr_db):
            line.append(row)
    return [
        _interpolated(comparison, row, name, line)
        for row in sound
        if row.method in methods
        for name, line in lines.items()
        if row.seconds >= line[0].seconds
    ]


def _interpolated(
    comparison: Comparison, row: Summed, name: str, line: Sequence[Summed]
) -> Interpolated:
    before = [other for other in line if other.seconds <= row.seconds][-1]
    after = next((other for other in line if other.seconds > row.seconds), before)
    span = after.seconds - before.seconds
    share = (row.seconds - before.seconds) / span if span else 0.0
    mine, low, high = (comparison.values(each.method) for each in (row, before, after))
    gaps: dict[int, list[float]] = {}
    ours, theirs = [], []  # of the same pictures
    for key in shared(mine, low.keys() & high.keys(), row.method, name):
        ours.append(mine[key])
        theirs.append((1 - share) * low[key] + share * high[key])
        gaps.setdefault(key[0], []).append(ours[-1] - theirs[-1])
    mean, error = mean_and_error(gaps)
    return Interpolated(
        row.method,
        name,
        row.seconds,
        tuple(dict.fromkeys((before.method, after.method))),
        round(mean, 2),
        None if error is None else round(error, 2),
        round(min(gap for by_seed in gaps.values() for gap in by_seed), 2),
        round(min(ours) - min(theirs), 2),
    )
