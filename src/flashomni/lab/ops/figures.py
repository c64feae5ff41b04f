"""The kernels' table in docs/performance.md: which figures, and what each of them is to reach.

One run measures all of them. Rows are kept as they come, so that an end costs none; what does not
fit into the time is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from flashomni.lab.ops.attention import FA4_LISTS
from flashomni.lab.ops.gemm import ADDMM, NO_BIAS
from flashomni.lab.ops.problem import Request
from flashomni.lab.ops.shapes import SHAPES
from flashomni.lab.ops.table import OpRow, measure_one

ALSO = ("cuDNN sdpa", "torch sdpa")  # measured beside, without a target


@dataclass(frozen=True)
class Figure:
    """One number of the table.

    Args:
        op: problem.
        shape: named shape.
        density: share that is left.
        baseline: what it is against.
        target: the least that the figure is to be.
        per_work: whether the baseline's time is taken times the density, as if it could skip.
    """

    op: str
    shape: str
    density: float
    baseline: str
    target: float
    per_work: bool = False

    @property
    def part(self) -> str:
        return "gemm" if self.op.startswith("gemm") else "attention"

    def value(self, row: OpRow) -> float:
        return row.of_ideal if self.per_work else row.ratio


def _dense(shape: str, target: float) -> Figure:
    return Figure("attention", shape, 1.0, "FA4", target)


def _sparse(shape: str, density: float, target: float) -> Figure:
    return Figure("attention", shape, density, "FA4", target, per_work=True)


def _lists(shape: str, density: float) -> Figure:
    return Figure("attention", shape, density, FA4_LISTS, 1.10)


FIGURES = (
    _dense("flux-1024", 1.10),
    _dense("flux-2048", 1.12),
    _dense("hunyuan-33k", 1.10),
    *(_sparse("hunyuan-33k", d, t) for d, t in ((0.5, 1.10), (0.25, 1.08), (0.1, 1.02))),
    *(_sparse("flux-2048", d, t) for d, t in ((0.5, 1.09), (0.25, 1.05), (0.1, 0.95))),
    *(_lists(s, d) for s in ("hunyuan-33k", "flux-2048") for d in (0.5, 0.25, 0.1)),
    _sparse("flux-1024", 0.25, 0.88),
    Figure("decode", "flux-1024", 1.0, "no symbols", 1 / 1.015),
    Figure("decode", "flux-2048", 1.0, "no symbols", 1 / 1.01),
    Figure("decode", "hunyuan-33k", 1.0, "no symbols", 1 / 1.01),
    Figure("attention_redone", "flux-2048", 1.0, "nothing done again", 1 / 2.4),
    *(
        Figure("gemm_o", "hunyuan-33k", d, ADDMM, t)
        for d, t in ((1.0, 1.05), (0.5, 2.0), (0.25, 3.6), (0.1, 6.1))
    ),
    *(
        Figure("gemm_q_fused", "hunyuan-33k", d, NO_BIAS, t)
        for d, t in ((1.0, 0.95), (0.5, 1.88), (0.25, 3.55), (0.1, 7.5))
    ),
    _dense("heads-64", 1.00),
    _sparse("heads-64", 0.25, 0.93),
    _dense("heads-96", 0.97),
    _sparse("heads-96", 0.25, 0.90),
    _dense("heads-80", 1.0),
    _sparse("heads-80", 0.25, 1.0),
    _dense("wan-720p", 1.04),
    _sparse("wan-720p", 0.25, 1.0),
    _sparse("flux-1024", 0.5, 1.0),
    _sparse("flux-1024", 0.1, 0.6),
)
PARTS = ("attention", "gemm")


def measure_figures(
    figures: tuple[Figure, ...],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    seconds: float,
    command: str,
    backend: str | None = None,
) -> Iterator[tuple[list[OpRow], list[tuple[Figure, float]], dict[str, str]]]:
    """Problem by problem: all its rows, the figures among them, and what is missing and why.

    A problem that fails is missing; so is what is not begun within ``seconds``.
    """
    begun = time.monotonic()
    problems: dict[tuple[str, str, float], list[Figure]] = {}
    for figure in figures:
        problems.setdefault((figure.op, figure.shape, figure.density), []).append(figure)
    for (op, shape, density), mine in problems.items():
        name = f"{op} {shape} {density:g}"
        if time.monotonic() - begun > seconds:
            yield [], [], {name: f"{seconds:g} s are over"}
            continue
        names = {figure.baseline for figure in mine} | set(ALSO)
        request = Request(SHAPES[shape], density, device, dtype, backend, names)
        try:
            rows, missing = measure_one(op, shape, request, rounds, command)
        except Exception as failure:  # one kernel that does not build costs its row, not the table
            yield [], [], {name: f"{type(failure).__name__}: {failure}"}
            continue
        by_name = {row.baseline: row for row in rows}
        found = [
            (figure, figure.value(by_name[figure.baseline]))
            for figure in mine
            if figure.baseline in by_name
        ]
        yield rows, found, {f"{name}, {other}": why for other, why in missing.items()}


def tabulate_figures(found: list[tuple[Figure, float]], title: str) -> Table:
    """The figures against what they are to reach."""
    table = Table("figure", "against", "is", "target", "", title=title, box=None)
    for figure, value in found:
        table.add_row(
            f"{figure.op} {figure.shape} {figure.density:g}",
            f"{figure.baseline} x density" if figure.per_work else figure.baseline,
            f"{value:.3f}",
            f"{figure.target:.3f}",
            "met" if value >= figure.target else "missed",
        )
    return table
