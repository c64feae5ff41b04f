"""Measurements of an op, as rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from rich.table import Table

from flashomni.lab.ops.problem import Problem, Request
from flashomni.lab.ops.problems import PROBLEMS
from flashomni.lab.ops.shapes import SHAPES
from flashomni.lab.ops.timing import interleaved
from flashomni.lab.results import origin


@dataclass(frozen=True)
class OpRow:
    """One measurement against one baseline.

    ``ratio`` is baseline_ms / ms; ``ideal`` what it would be if time fell with the work.
    """

    op: str
    shape: str
    seqlen: int
    density: float
    backend: str
    ms: float
    baseline: str
    baseline_ms: float
    ratio: float
    ideal: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def of_ideal(self) -> float:
        return self.ratio / self.ideal


def measure(
    op: str,
    shape: str,
    densities: list[float],
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    command: str,
    backend: str | None = None,
    baselines: Collection[str] | None = None,
) -> Iterator[tuple[list[OpRow], dict[str, str]]]:
    """``(a row for each baseline, baselines that are missing and why)`` of each density.

    ``baselines`` names those to measure against; all of them if ``None``.

    Raises:
        ValueError: unknown op or shape.
        RuntimeError: the op's result is wrong; then nothing is timed.
    """
    if op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    # Freeing a block this large once lets the C allocator keep such blocks, not return them
    # to the system at every call, as in a process that has run a model. Both sides gain.
    torch.ones(24 * 2**20, dtype=torch.uint8)
    for density in densities:
        request = Request(SHAPES[shape], density, device, dtype, backend, baselines)
        yield measure_one(op, shape, request, rounds, command)


def measure_one(
    op: str, shape: str, request: Request, rounds: int, command: str
) -> tuple[list[OpRow], dict[str, str]]:
    """One problem: a row for each baseline, and the baselines that are missing and why.

    Raises:
        RuntimeError: the op's result is wrong; then nothing is timed.
    """
    torch.manual_seed(0)
    problem = PROBLEMS[op](request)
    _check(problem, request.dtype)
    others = {name: baseline.run for name, baseline in problem.baselines.items()}
    runs = {"ours": problem.ours, **others}
    ms = interleaved(runs, request.device, rounds, problem.sets)
    rows = [
        OpRow(
            op=op,
            shape=shape,
            seqlen=request.shape.seqlen,
            density=problem.density,
            backend=problem.backend,
            ms=round(ms["ours"], 4),
            baseline=name,
            baseline_ms=round(ms[name], 4),
            ratio=round(ms[name] / ms["ours"], 3),
            ideal=round(baseline.ideal, 3),
            **origin(request.device, command),
        )
        for name, baseline in problem.baselines.items()
    ]
    return rows, problem.missing


def _check(problem: Problem, dtype: torch.dtype) -> None:
    """Compare with the fp32 definition before anything is timed; some baselines with ours.

    A baseline that is wrong or fails is one that is missing, with the reason.
    """
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    if problem.check is not None:
        error = problem.check()
        if not error <= limit:
            raise RuntimeError(f"relative error {error:.2e} is above {limit:.0e}: nothing is timed")
    for name, baseline in list(problem.baselines.items()):
        if baseline.check is None:
            continue
        try:
            error = baseline.check()
            why = "" if error <= limit else f"relative error {error:.2e} is above {limit:.0e}"
        except Exception as failure:  # somebody else's kernels
            why = f"{type(failure).__name__}: {str(failure)[:200]}"
        if why:
            del problem.baselines[name]
            problem.missing[name] = why


def tabulate_ops(rows: list[OpRow]) -> Table:
    """Rows of one op and shape, for the eye."""
    first = rows[0]
    columns = ("density", "ms", "baseline", "its ms", "speed-up", "of linear")
    title = f"{first.op}, {first.shape}, backend {first.backend}, {first.gpu}"
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            f"{row.density:.3f}",
            f"{row.ms:.3f}",
            row.baseline,
            f"{row.baseline_ms:.3f}",
            f"{row.ratio:.3f}x",
            f"{row.of_ideal:.3f}",
        )
    return table
