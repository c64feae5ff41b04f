"""Which configuration of a portable kernel is fastest on this card: candidates, and the choice.

What runs and times them is a :class:`Bench`; :mod:`.tiles_bench` has that of a GPU.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from flashomni.kernels.common import tuned
from flashomni.kernels.common.configs import Config
from flashomni.util.files import check_file, locked, write_text

OPS = ("attention", "gemm_q", "gemm_o")
HEAD_DIMS = (128, 64, 256)  # as kernels pad them, the most used first
SECONDS = 180.0
MAX_SUMS = 128  # of the 255 registers of a thread
MARGIN = 1.02  # a difference below 2 % is none
# tile_m, tile_n, warps, stages: a tile holds the whole head_dim
ATTENTION = (
    (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3),
    (64, 32, 8, 2), (64, 32, 4, 3), (128, 128, 8, 2),
)  # fmt: skip
# tile_m, tile_k, warps, stages: a tile is one head wide
GEMM_Q = (
    (128, 64, 8, 3), (128, 32, 4, 4), (128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4),
    (128, 32, 8, 3),
)  # fmt: skip
# tile_m, tile_n, tile_k, warps, stages: tile_k is cut down to head_dim
GEMM_O = (
    (128, 128, 64, 8, 3), (128, 64, 32, 4, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
    (128, 128, 32, 8, 3), (128, 256, 64, 8, 3),
)  # fmt: skip


class Task(NamedTuple):
    """An entry of a table: ``head_dim`` as kernels pad it, elements of ``num_bytes``."""

    op: str
    head_dim: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{self.op} {self.head_dim}"

    @property
    def table(self) -> str:
        return f"{self.op}/portable"

    @property
    def key(self) -> str:
        return tuned.key(self.head_dim, self.num_bytes)


class Bench(Protocol):
    """Runs configurations on a device."""

    def shipped(self, task: Task) -> Config:
        """The configuration that counts where nobody has tuned."""

    def wrong(self, task: Task, config: Config) -> str | None:
        """Why it may not be chosen: it does not run, or what it computes is wrong."""

    def refused(self, task: Task, config: Config) -> str | None:
        """Which other calls of the op it does not run: with a summary, an LSE, without symbols."""

    def times(self, task: Task, configs: Sequence[Config]) -> list[tuple[float, ...]]:
        """Median milliseconds of each, in turns; one at each density."""


@dataclass(frozen=True)
class Found:
    """What was chosen.

    Args:
        task: for what.
        shipped: what counts untuned.
        config: the choice; ``None`` where nothing ran right.
        gain: how many times as fast as the shipped one, over all densities; 1 where that stays,
            and where it does not run and so has no time.
        tried: candidates that ran right, the shipped one among them.
    """

    task: Task
    shipped: Config
    config: Config | None
    gain: float
    tried: int


def tasks(num_bytes: int, head_dims: Sequence[int] = HEAD_DIMS) -> list[Task]:
    """What to tune, the most important first: attention of the models' sizes, then the rest."""
    first, rest = list(head_dims)[:2], list(head_dims)[2:]
    order = [(op, dim) for dims in (first, rest) for op in OPS for dim in dims]
    return [Task(op, dim, num_bytes) for op, dim in order]


def candidates(task: Task, shared_memory: int) -> list[Config]:
    """A few configurations whose buffers and sums fit.

    Args:
        task: for what.
        shared_memory: bytes that a program may have on the device.
    """
    dim = task.head_dim
    if task.op == "attention":
        found = [Config(m, n, dim, warps, stages) for m, n, warps, stages in ATTENTION]
    elif task.op == "gemm_q":
        found = [Config(m, dim, k, warps, stages) for m, k, warps, stages in GEMM_Q]
    else:
        found = [Config(m, n, min(k, dim), warps, stages) for m, n, k, warps, stages in GEMM_O]
        found = list(dict.fromkeys(found))
    return [
        config
        for config in found
        if buffers(task, config) <= shared_memory and _sums(task, config) <= MAX_SUMS
    ]


def _sums(task: Task, config: Config) -> int:
    """fp32 sums that each thread of a warp of 32 holds."""
    columns = task.head_dim if task.op == "attention" else config.tile_n
    return config.tile_m * columns // (32 * config.num_warps)


def buffers(task: Task, config: Config) -> int:
    """Bytes that the pipeline of a kernel's loop holds at least; a kernel may need more."""
    if task.op == "attention":
        elements = 2 * config.tile_n * task.head_dim  # a tile of keys, one of values
    else:
        elements = (config.tile_m + config.tile_n) * config.tile_k
    return elements * task.num_bytes * max(config.num_stages - 1, 1)


def tune(
    wanted: Sequence[Task],
    bench: Bench,
    shared_memory: int,
    *,
    seconds: float = SECONDS,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Found]:
    """Choose a configuration for each task, until the time is up.

    Args:
        wanted: the most important first.
        bench: runs them.
        shared_memory: as of :func:`candidates`.
        seconds: after this no candidate is begun; the one that runs and its task are finished.
        tell: gets a line of whatever was left out.
        on_progress: gets candidates done, candidates in all, and the task.
        clock: seconds.
    """
    end = clock() + seconds
    lists = [candidates(task, shared_memory) for task in wanted]
    total, done = sum(map(len, lists)), 0
    for number, (task, rivals) in enumerate(zip(wanted, lists, strict=True)):
        shipped = bench.shipped(task)
        wished = list(dict.fromkeys((shipped, *rivals)))
        right, tried = [], 0
        for config in wished:
            if clock() >= end:
                break
            on_progress(done, total, str(task))
            why = bench.wrong(task, config)
            if why is None:
                right.append(config)
            else:
                tell(f"{task} {_short(config)}: left out, {why}")
            done += config in rivals
            tried += 1
        if tried < min(2, len(wished)):
            names = ", ".join(map(str, wanted[number:]))
            tell(f"the time is up; not tuned: {names}. More --seconds would reach them")
            return
        if tried < len(wished):
            tell(f"{task}: the time is up, {tried - 1} of its candidates were tried")
        yield _choose(task, shipped, right, bench, tell)
    on_progress(total, total, "")


def _choose(
    task: Task, shipped: Config, right: list[Config], bench: Bench, tell: Callable[[str], None]
) -> Found:
    """The fastest, if it is faster than the shipped one twice: of many one is always lucky."""
    others = [config for config in right if config != shipped]
    stays = Found(task, shipped, shipped if shipped in right else None, 1.0, len(right))
    if not others:
        return stays
    times = dict(zip(right, bench.times(task, right), strict=True))
    best = max(others, key=lambda config: _gain(times[right[0]], times[config]))
    gain = 1.0
    if shipped in right:
        if not _is_better(times[shipped], times[best]):
            return stays
        again = bench.times(task, [shipped, best])
        gain = _gain(*again)
        if not _is_better(*again):
            return stays
    why = bench.refused(task, best)
    if why is not None:
        tell(f"{task} {_short(best)}: fastest, but {why}")
        return stays
    return Found(task, shipped, best, round(gain, 3), len(right))


def _gain(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast as the base; the geometric mean over the densities."""
    return math.prod(a / b for a, b in zip(base, other, strict=True)) ** (1 / len(base))


def _is_better(base: Sequence[float], other: Sequence[float]) -> bool:
    """Faster by more than noise, and slower by more than that at no density."""
    worst = min(a / b for a, b in zip(base, other, strict=True))
    return _gain(base, other) > MARGIN and worst > 1 / MARGIN


def _short(config: Config) -> str:
    return "x".join(map(str, config[:3])) + f" warps {config.num_warps} stages {config.num_stages}"


class Keeper:
    """Puts choices into the user's file of a card as they come; it is whole at any time.

    Args:
        card: its name.
        commit: of the code, for the reader.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, card: str, commit: str) -> None:
        self.card, self.commit, self.path = card, commit, Path(tuned.file_of(card))
        check_file("the file of tuned kernels", self.path)
        self.ignored = tuned.load(self.path).ignored  # its entries go with the first choice

    def keep(self, found: Found) -> None:
        """Add a choice, beside those that were made with the same versions."""
        task = found.task
        if found.config is None:
            return
        with locked(self.path.parent):
            old = tuned.load(self.path)
            tables = {table: dict(entries) for table, entries in old.tables.items()}
            tried = {table: dict(gains) for table, gains in old.tried.items()}
            tables.setdefault(task.table, {}).pop(task.key, None)
            if found.config != found.shipped:
                tables[task.table][task.key] = found.config._asdict()
            tried.setdefault(task.table, {})[task.key] = found.gain
            whole = {
                "card": self.card, "made with": tuned.made_with(), "commit": self.commit,
                "when": datetime.date.today().isoformat(), "tables": tables, "tried": tried,
            }  # fmt: skip
            write_text(self.path, json.dumps(whole, indent=1, sort_keys=True) + "\n")
        tuned.forget()
