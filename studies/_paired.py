"""Methods compared on the same prompts and seeds: runs, their file, means with standard errors.

A pair is a prompt and a seed. Pairs are the outer loop, so that whatever was measured when time is
over is complete but for the last one, and differences between methods are of the same pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab import metrics
from flashomni.lab.generation import Generation
from flashomni.lab.report import save_picture
from flashomni.lab.versions import versions
from flashomni.models import accelerate

FLIP_FRAMES = 8  # of a video, FLIP looks at every eighth frame


@dataclass(frozen=True)
class Measured:
    """One generation under a method.

    Args:
        model: name.
        method: as ``flashomni eval --method`` takes it.
        prompt: its number in the split.
        seed: of the noise.
        steps: of the generation.
        psnr_db: against the stock pipeline; infinite where the bits are the same.
        flip: against the stock pipeline; ``None`` where it cannot be measured.
        spent: attention computed over the whole generation, of dense, as the report counts it.
        time: seconds of the generation, of the stock pipeline's; ``None`` where nobody timed it.
        skipped: FLOPs of all ops skipped.
        dtype: of the model.
        device: name of the device.
        commit: of the project.
        torch: version.
        diffusers: version.
    """

    model: str
    method: str
    prompt: int
    seed: int
    steps: int
    psnr_db: float
    flip: float | None
    spent: float
    skipped: float
    time: float | None
    dtype: str
    device: str
    commit: str
    torch: str
    diffusers: str

    @property
    def key(self) -> tuple:
        place = self.prompt, self.seed, self.steps, self.dtype, self.device
        return self.model, self.method, *place, self.time is not None

    @property
    def pair(self) -> tuple[int, int]:
        return self.prompt, self.seed


def read(path: Path) -> list[Measured]:
    """What was measured before; a line that was cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(Measured(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


class Runner:
    """Measures methods on pairs, and keeps each measurement as soon as it is there.

    Args:
        folder: of the file of measurements, and of pictures.
        deadline: by ``time.monotonic()``; nothing begins after it.
        progress: shows how far it is.
    """

    def __init__(self, folder: Path, deadline: float, progress: Progress) -> None:
        self._path = folder / "measured.jsonl"
        self._folder, self._deadline, self._progress = folder, deadline, progress
        folder.mkdir(parents=True, exist_ok=True)
        self.found = {each.key: each for each in read(self._path)}

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline

    def pair(
        self,
        model: str,
        loaded: Any,
        methods: Sequence[str],
        prompt: tuple[int, str],
        seed: int,
        steps: int | None,
        *,
        timed: bool,
        drawn: Sequence[str] = (),
    ) -> bool:
        """Measure all methods that are not known yet on one pair.

        Args:
            model: name.
            loaded: of the zoo.
            methods: what to measure.
            prompt: number and text.
            seed: of the noise.
            steps: denoising steps; the model's own by default.
            timed: time each, and the stock pipeline, once nothing compiles or is recorded.
            drawn: methods whose pictures are kept, the stock pipeline's with them.

        Returns:
            Whether the time sufficed.
        """
        number, text = prompt
        generation = Generation(loaded, text, seed, steps)
        seen = versions(generation.device)
        dtype = str(generation.pipe.transformer.dtype).removeprefix("torch.")
        where = (number, seed, generation.num_steps, dtype, seen["device"])
        due = [each for each in methods if (model, each, *where, timed) not in self.found]
        task = self._progress.add_task(f"{model}, prompt {number}, seed {seed}", total=len(due))
        reference, dense_seconds = None, 0.0
        for method in due:
            if self.over:
                return False
            if reference is None:
                reference, dense_seconds = _run(generation, timed)
                self._draw(model, "stock", reference, drawn)
            with accelerate(generation.pipe, Recipe.of(method)) as engine:
                if timed and generation.compiles:
                    generation.discard()  # the next one is recorded, the third is a replay
                pixels, seconds = _run(generation, timed)
                report = engine.report()
            flip = None
            if metrics.why_no_flip() is None:
                flip = metrics.flip(reference[::FLIP_FRAMES], pixels[::FLIP_FRAMES])
            dense, executed = report.flops_dense["attention"], report.flops_executed["attention"]
            measured = Measured(
                model, method, *where[:3], metrics.psnr(reference, pixels), flip,
                executed / dense, report.flops_skipped, seconds / dense_seconds if timed else None,
                dtype, seen["device"], seen["commit"], seen["torch"], seen["diffusers"],
            )  # fmt: skip
            self._keep(measured)
            if method in drawn:
                self._draw(model, drawn.index(method), pixels, drawn)
            self._progress.advance(task)
        self._progress.remove_task(task)
        return True

    def _keep(self, measured: Measured) -> None:
        self.found[measured.key] = measured
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(measured)) + "\n")

    def _draw(self, model: str, name: Any, pixels: Tensor, drawn: Sequence[str]) -> None:
        """Keep the middle frame, for the sheet of pictures."""
        if drawn:
            middle, path = len(pixels) // 2, self._folder / f"{file_name(model)}-{name}"
            save_picture(pixels[middle : middle + 1].cpu(), path)


def file_name(model: str) -> str:
    """A model's name in the name of a file."""
    return model.replace("/", "_")


def _run(generation: Generation, timed: bool) -> tuple[Tensor, float]:
    """Frames and seconds: of a later generation where they count."""
    if timed:
        generation.discard()
    return generation.run(_nothing)


def _nothing(step: int, total: int) -> None:
    """No bar of its own."""


@dataclass(frozen=True)
class Mean:
    """Of one method over pairs.

    Args:
        value: mean.
        error: its standard error; ``nan`` for a single pair.
        count: pairs.
    """

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of finite values; none of them is ``nan``."""
        if not values:
            return cls(math.nan, math.nan, 0)
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), spread / math.sqrt(len(values)), len(values))

    def __str__(self) -> str:
        if not self.count:
            return ""
        shown = f"{self.value:.1f}"
        return shown if math.isnan(self.error) else f"{shown} ± {self.error:.1f}"


class Table:
    """Measurements of one model by method and pair.

    Args:
        found: of that model, device and number of steps.
        methods: only pairs that hold all of these count.
        timed: whether a method costs its time, or the attention that it spends.
    """

    def __init__(
        self, found: Sequence[Measured], methods: Sequence[str], timed: bool = False
    ) -> None:
        self.timed, self._found = timed, found
        by_pair: dict[tuple[int, int], dict[str, Measured]] = {}
        for each in found:
            known = by_pair.setdefault(each.pair, {})
            if each.method not in known or each.time is not None:
                known[each.method] = each
        whole = {pair: some for pair, some in by_pair.items() if set(methods) <= set(some)}
        self.pairs = sorted(whole)
        self._rows = whole

    @property
    def commits(self) -> list[str]:
        """Of all measurements that count."""
        return sorted({each.commit for some in self._rows.values() for each in some.values()})

    def row(self, method: str) -> Measured:
        """The measurement of the first pair."""
        return self._rows[self.pairs[0]][method]

    def column(self, method: str, value: Callable[[Measured], float | None]) -> list[float]:
        """A value of a method in each pair; empty where it is not known."""
        values = [value(self._rows[pair][method]) for pair in self.pairs]
        return [x for x in values if x is not None] if None not in values else []

    def psnr(self, method: str) -> list[float]:
        """Of each pair; 99 dB where the bits are the same."""
        return [min(x, 99.0) for x in self.column(method, lambda m: m.psnr_db)]

    def cost(self, method: str) -> float:
        """What a method costs, of dense: the mean of attention spent, or of the times taken."""
        if not self.timed:
            return statistics.fmean(self.column(method, lambda m: m.spent))
        times = [x.time for x in self._found if x.method == method and x.time is not None]
        return statistics.fmean(times) if times else math.nan

    def whole_cost(self, method: str) -> float:
        """What a generation costs, of dense: time, or the mean of the FLOPs of all ops computed."""
        if self.timed:
            return self.cost(method)
        return 1 - statistics.fmean(self.column(method, lambda m: m.skipped))

    def between(
        self,
        methods: Sequence[str],
        cost: float,
        cost_of: Callable[[str], float] | None = None,
    ) -> list[float]:
        """PSNR of each pair where a line through the methods costs so much."""
        cost_of = cost_of or self.cost
        order = sorted(methods, key=cost_of)
        costs = [cost_of(method) for method in order]
        values = [self.psnr(method) for method in order]
        return [
            _on_line(list(zip(costs, line, strict=True)), cost)
            for line in zip(*values, strict=True)
        ]


def _on_line(line: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between two points, at an end its value."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x <= x1:
            share = min(max((x - x0) / max(x1 - x0, 1e-9), 0.0), 1.0)
            return y0 + share * (y1 - y0)
    return line[-1][1]


def pairs(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[tuple[int, str], int]]:
    """Every prompt with every seed: all prompts of the first seed first."""
    for seed in seeds:
        for number, text in enumerate(prompts):
            yield (number, text), seed
