"""Methods compared on the same prompts and seeds: runs, their file, means with standard errors.

A pair is a prompt and a seed. Pairs are the outer loop, so that whatever was measured when time is
over is complete but for the last one. Differences between methods are of the pairs that both have.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab import metrics
from flashomni.lab.generation import Generation
from flashomni.lab.report import save_picture
from flashomni.lab.versions import versions
from flashomni.models import accelerate

Pair = tuple[int, int]  # prompt and seed
Values = dict[Pair, float]
REPEATS = 3  # timed generations
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
        time: seconds of the generation without its decoder, of the stock pipeline's; ``None`` where
            nobody timed it.
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
    def pair(self) -> Pair:
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
            timed: time each, and the stock pipeline.
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
                dense_seconds = _denoising(generation) if timed else 0.0
                reference, _ = generation.run(_nothing)
                self._draw(model, "stock", reference, drawn)
            with accelerate(generation.pipe, Recipe.of(method)) as engine:
                seconds = _denoising(generation) if timed else 0.0
                pixels, _ = generation.run(_nothing)
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
        line = json.dumps(dataclasses.asdict(measured)) + "\n"
        with self._path.open("ab+") as file:  # reads anywhere, writes at the end
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else f"\n{line}"  # behind one that was cut
            file.write(line.encode())

    def _draw(self, model: str, name: Any, pixels: Tensor, drawn: Sequence[str]) -> None:
        """Keep the middle frame, for the sheet of pictures."""
        if drawn:
            middle, path = len(pixels) // 2, self._folder / f"{file_name(model)}-{name}"
            save_picture(pixels[middle : middle + 1].cpu(), path)


def file_name(model: str) -> str:
    """A model's name in the name of a file."""
    return model.replace("/", "_")


def _denoising(generation: Generation) -> float:
    """Seconds of a generation without its decoder: the median of those behind the first two.

    The first compiles and the second is recorded.
    """
    call = {**generation.call, "output_type": "latent"}
    seconds = []
    for _ in range(REPEATS + 2 if generation.compiles else 1):
        noise = torch.Generator("cpu").manual_seed(generation.seed)
        _wait(generation.device)
        start = time.perf_counter()
        generation.pipe(generation.prompt, **call, generator=noise)
        _wait(generation.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[-REPEATS:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _nothing(step: int, total: int) -> None:
    """No bar of its own."""


@dataclass(frozen=True)
class Mean:
    """Of values of pairs: seeds of a prompt belong together, so they are averaged first.

    Args:
        value: mean over prompts of the means over their seeds.
        error: its standard error, over prompts; ``nan`` for a single prompt.
        count: pairs.
        prompts: of these pairs.
    """

    value: float
    error: float
    count: int
    prompts: int

    @classmethod
    def of(cls, values: Values) -> Mean:
        """The mean of finite values by pair."""
        by_prompt: dict[int, list[float]] = {}
        for (prompt, _), value in values.items():
            by_prompt.setdefault(prompt, []).append(value)
        means = [statistics.fmean(some) for some in by_prompt.values()]
        if not means:
            return cls(math.nan, math.nan, 0, 0)
        error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return cls(statistics.fmean(means), error, len(values), len(means))

    @property
    def counted(self) -> str:
        """Pairs, and in brackets of how many prompts."""
        return f"{self.count} ({self.prompts})"

    def __str__(self) -> str:
        if not self.count:
            return ""
        shown = f"{self.value:.1f}"
        return shown if math.isnan(self.error) else f"{shown} ± {self.error:.1f}"


def minus(first: Values, second: Values) -> Values:
    """Differences of the pairs that both hold."""
    return {pair: value - second[pair] for pair, value in first.items() if pair in second}


class Table:
    """Measurements of one model by method and pair.

    Args:
        found: of that model, device and number of steps.
        timed: whether a method costs its time, or the attention that it spends.
    """

    def __init__(self, found: Sequence[Measured], timed: bool = False) -> None:
        self.timed = timed
        self._rows: dict[str, dict[Pair, Measured]] = {}
        for each in found:
            known = self._rows.setdefault(each.method, {})
            if each.pair not in known or each.time is not None:
                known[each.pair] = each

    @property
    def methods(self) -> list[str]:
        """All that were measured on a pair at least."""
        return list(self._rows)

    @property
    def commits(self) -> list[str]:
        """Of all measurements."""
        return sorted({each.commit for some in self._rows.values() for each in some.values()})

    def pairs(self, method: str) -> list[Pair]:
        """Those on which a method was measured."""
        return sorted(self._rows.get(method, {}))

    def row(self, method: str) -> Measured:
        """The measurement of the first pair."""
        return self._rows[method][self.pairs(method)[0]]

    def column(self, method: str, value: Callable[[Measured], float | None]) -> Values:
        """A value of a method by pair, where it is known."""
        values = {pair: value(row) for pair, row in sorted(self._rows.get(method, {}).items())}
        return {pair: x for pair, x in values.items() if x is not None}

    def psnr(self, method: str) -> Values:
        """By pair; 99 dB where the bits are the same."""
        return self.column(method, lambda m: min(m.psnr_db, 99.0))

    def cost(self, method: str) -> float:
        """What a method costs, of dense: the mean of attention spent, or of the times taken.

        Raises:
            ValueError: nobody measured it, or timed it.
        """
        values = self.column(method, lambda m: m.time if self.timed else m.spent)
        if not values:
            raise ValueError(f"nobody {'timed' if self.timed else 'measured'} {method}")
        return Mean.of(values).value

    def by_attention(self) -> Table:
        """The same, where what a method costs is the attention that it spends."""
        return Table([each for some in self._rows.values() for each in some.values()])

    def whole_cost(self, method: str) -> float:
        """What a generation costs, of dense: time, or the mean of the FLOPs of all ops computed."""
        if self.timed:
            return self.cost(method)
        return 1 - Mean.of(self.column(method, lambda m: m.skipped)).value

    def between(
        self,
        methods: Sequence[str],
        cost: float,
        cost_of: Callable[[str], float] | None = None,
    ) -> Values:
        """PSNR by pair where a line through the methods costs so much: at an end, that of the end.

        Of pairs that hold both methods between which the cost lies.
        """
        line = sorted(((cost_of or self.cost)(method), method) for method in methods)
        for (x0, low), (x1, high) in itertools.pairwise(line):
            if x0 < cost < x1:
                share, below, above = (cost - x0) / (x1 - x0), self.psnr(low), self.psnr(high)
                return {p: y + share * (above[p] - y) for p, y in below.items() if p in above}
        return self.psnr(min(line, key=lambda point: abs(point[0] - cost))[1])


def pairs(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[tuple[int, str], int]]:
    """Every prompt with every seed: all prompts of the first seed first."""
    for seed in seeds:
        for number, text in enumerate(prompts):
            yield (number, text), seed
