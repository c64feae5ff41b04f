"""What a comparison found: rows, and differences at equal time, paired over prompts and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashomni.lab import results as files
from flashomni.lab.fidelity.impossible import impossible
from flashomni.lab.fidelity.judged import CAP_DB
from flashomni.lab.versions import commit, device_name

AT_MOST = 1.03  # times that differ by less than this are equal


@dataclass(frozen=True)
class Picture:
    """One picture or video of one method, against the pipeline's own.

    Args:
        method: its name.
        prompt: number of the prompt.
        seed: of the noise.
        psnr_db: ``None`` where values are not finite; at most ``CAP_DB``.
        ssim: mean over frames, or ``None``.
        temporal_db: PSNR of the changes from frame to frame, of videos.
        computed: steps that were not left out, or ``None`` where nobody counts.
        flops_skipped: share of the blocks' FLOPs, or ``None``.
        attention_spent: attention that was computed, of dense in every step, or ``None``.
        measures: scores that were asked for.
        seconds: that it took, and ``dense_seconds`` the stock pipeline's, where each picture is
            timed.
        num_steps: of the generation, if known: no more can be computed.
    """

    method: str
    prompt: int
    seed: int
    psnr_db: float | None
    ssim: float | None
    temporal_db: float | None
    computed: float | None
    flops_skipped: float | None
    attention_spent: float | None = None
    measures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    dense_seconds: float | None = None
    num_steps: int | None = None


@dataclass(frozen=True)
class Timed:
    """Seconds of one picture, and of the stock pipeline's around it."""

    method: str
    family: str
    seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class Summed:
    """One method: means over its pictures, standard errors over prompts. Empty: not known."""

    model: str
    method: str
    family: str
    device: str
    seconds: float
    dense_seconds: float
    speedup: float
    psnr_db: float | str
    psnr_error: float | str
    worst_psnr_db: float | str
    ssim: float | str
    temporal_db: float | str
    computed: float | str
    flops_skipped: float | str
    prompts: int
    seeds: int
    measures: str
    attention_spent: float | str = ""
    commit: str = ""


@dataclass(frozen=True)
class Rivalry:
    """A method against the best rival that is not slower: PSNR, in dB, picture by picture.

    Args:
        method: its name.
        rival: the best of the others at equal time.
        seconds: of the method.
        rival_seconds: of the rival.
        gain_db: mean of the differences.
        error_db: standard error of that mean, over prompts.
        worst_db: lowest difference.
    """

    method: str
    rival: str
    seconds: float
    rival_seconds: float
    gain_db: float
    error_db: float | None
    worst_db: float


@dataclass(frozen=True)
class Comparison:
    """Pictures and times of several methods on one pipeline.

    Args:
        rows: one a method, in the order in which they ran.
        pictures: each picture.
        left_out: methods that there was no time for.
        seconds: that it took.
    """

    rows: tuple[Summed, ...]
    pictures: tuple[Picture, ...]
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        pictures: Sequence[Picture],
        times: Sequence[Timed],
        device: torch.device,
        left_out: Iterable[str] = (),
        seconds: float = 0.0,
        model: str = "",
    ) -> Comparison:
        """Sum up what was found."""
        name = device_name(device)
        rows = [
            _summed(timed, [p for p in pictures if p.method == timed.method], name, model)
            for timed in times
        ]
        return cls(tuple(rows), tuple(pictures), tuple(left_out), seconds)

    @classmethod
    def of_timed(
        cls,
        pictures: Sequence[Picture],
        families: Mapping[str, str],
        device: str,
        seconds: float = 0.0,
        model: str = "",
    ) -> Comparison:
        """Sum up pictures that were timed one by one: times are medians over them.

        Args:
            pictures: all with ``seconds``.
            families: of the methods, in the order of rows.
            device: name of it.
            seconds: that it took.
            model: what rows call the pipeline.
        """
        rows = []
        for method, family in families.items():
            mine = [picture for picture in pictures if picture.method == method]
            taken, dense = (
                statistics.median(getattr(picture, name) for picture in mine)
                for name in ("seconds", "dense_seconds")
            )
            rows.append(_summed(Timed(method, family, taken, dense), mine, device, model))
        return cls(tuple(rows), tuple(pictures), (), seconds)

    @classmethod
    def merged(cls, looked: Sequence[Comparison], timed: Comparison) -> Comparison:
        """Pictures of some comparisons, which may be parts of one, and the times of another.

        A method that has no pictures or no times is left out.
        """
        pictures = [picture for each in looked for picture in each.pictures]
        seen = {picture.method for picture in pictures}
        rows = [row for row in timed.rows if row.method in seen]
        absent = [name for each in looked for name in each.left_out] + list(timed.left_out)
        summed = []
        for row in rows:
            times = Timed(row.method, row.family, row.seconds, row.dense_seconds)
            mine = [picture for picture in pictures if picture.method == row.method]
            summed.append(_summed(times, mine, row.device, row.model))
        seconds = max((each.seconds for each in looked), default=0.0) + timed.seconds
        return cls(tuple(summed), tuple(pictures), tuple(dict.fromkeys(absent)), seconds)

    def values(self, method: str) -> dict[tuple[int, int], float]:
        """PSNR of a method by prompt and seed, where it is known."""
        return {
            (p.prompt, p.seed): p.psnr_db
            for p in self.pictures
            if p.method == method and p.psnr_db is not None
        }

    @property
    def impossible(self) -> dict[str, str]:
        """Methods with a figure that cannot be, and the first such picture, in words."""
        found: dict[str, str] = {}
        for each in self.pictures:
            for words in impossible(each, each.num_steps):
                found.setdefault(each.method, f"prompt {each.prompt}, seed {each.seed}: {words}")
        return found

    def equal_time(
        self, rivals: Sequence[str] = ("peers", "stock"), methods: Sequence[str] | None = None
    ) -> list[Rivalry]:
        """Each method against the best rival that takes at most 3 % longer.

        Args:
            rivals: families, or names of methods.
            methods: which; all that are no rivals if left out. One without a rival that is as fast
                is left out.

        Raises:
            ValueError: a method and its rival have no picture of the same prompt and seed.
        """
        sound = [row for row in self.rows if isinstance(row.psnr_db, float)]
        others = [row for row in sound if row.family in rivals or row.method in rivals]
        mine = [row for row in sound if row not in others]
        if methods is not None:
            mine = [row for row in sound if row.method in methods]
        found = []
        for row in mine:
            fast = [o for o in others if o.seconds <= AT_MOST * row.seconds and o != row]
            if not fast:
                continue
            best = max(fast, key=lambda other: float(other.psnr_db))
            gaps = self._gaps(row.method, best.method)
            mean, error = mean_and_error(gaps)
            worst = min(gap for by_seed in gaps.values() for gap in by_seed)
            found.append(
                Rivalry(
                    row.method, best.method, row.seconds, best.seconds, round(mean, 2),
                    None if error is None else round(error, 2), round(worst, 2),
                )
            )  # fmt: skip
        return found

    def _gaps(self, method: str, rival: str) -> dict[int, list[float]]:
        """Differences in dB of each prompt, one a seed.

        Raises:
            ValueError: no picture is of both.
        """
        mine, theirs = self.values(method), self.values(rival)
        shared(mine, theirs, method, rival)
        gaps: dict[int, list[float]] = {}
        for prompt, seed in (key for key in mine if key in theirs):
            gaps.setdefault(prompt, []).append(mine[prompt, seed] - theirs[prompt, seed])
        return gaps

    def save(self, path: str | Path, model: str) -> None:
        """Put the rows into a CSV; older ones of the same model, method and device are replaced.

        Not those with a figure that is :attr:`impossible`: where a counter is wrong, nobody knows
        what else is.

        Args:
            path: of the file.
            model: what rows call the pipeline.
        """
        sound = [row for row in self.rows if row.method not in self.impossible]
        rows = [Summed(**{**asdict(row), "model": model}) for row in sound]
        files.replace(path, rows, ("model", "method", "device"))

    def __str__(self) -> str:
        lines = [
            f"{'method':44} {'s':>7} {'speed':>6} {'PSNR':>6} {'+-':>4} {'worst':>6} {'SSIM':>6}"
            " spent"
        ]
        for row in self.rows:
            lines.append(
                f"{row.method[:44]:44} {row.seconds:7.3f} {row.speedup:5.2f}x {_show(row.psnr_db)}"
                f" {_show(row.psnr_error, 4)} {_show(row.worst_psnr_db)} {_show(row.ssim, 6, 4)}"
                f" {_show(row.attention_spent, 5, 3)}"
                f" {row.measures}"
            )
        lines += [
            f"{r.method} - {r.rival}: {r.gain_db:+.2f} dB"
            + ("" if r.error_db is None else f" +- {r.error_db:.2f}")
            + f", worst {r.worst_db:+.2f} ({r.seconds:.3f} s, {r.rival_seconds:.3f} s)"
            for r in self.equal_time()
        ]
        lines += [f"IMPOSSIBLE, not saved: {m}, {why}" for m, why in self.impossible.items()]
        lines += [f"not run, there was no time: {', '.join(self.left_out)}"] * bool(self.left_out)
        return "\n".join(lines)


def shared(
    mine: Mapping[tuple[int, int], float],
    theirs: Iterable[tuple[int, int]],
    method: str,
    rival: str,
) -> list[tuple[int, int]]:
    """Prompts and seeds that two methods, or a method and a line of rivals, both have.

    Raises:
        ValueError: there is none, so that nothing can be paired.
    """
    theirs = set(theirs)
    found = [key for key in mine if key in theirs]
    if not found:
        raise ValueError(
            f"comparison must have pictures of the same prompt and seed of {method!r} and of "
            f"{rival!r}; got {len(mine)} of the one and {len(theirs)} of the other, none shared"
        )
    return found


def mean_and_error(by_prompt: Mapping[Any, Sequence[float]]) -> tuple[float, float | None]:
    """Mean over all, and its standard error: prompts are drawn, the seeds of one belong together.

    With one prompt the seeds are what is drawn; with one number there is no error.
    """
    means = [statistics.fmean(values) for values in by_prompt.values()]
    drawn = means if len(means) > 1 else [x for values in by_prompt.values() for x in values]
    error = statistics.stdev(drawn) / math.sqrt(len(drawn)) if len(drawn) > 1 else None
    return statistics.fmean(means), error


def mean_psnr(values: Iterable[tuple[Any, float]]) -> tuple[float, float | None, float]:
    """Mean PSNR over prompts of means over seeds, its standard error, and the worst.

    Identical pictures, at ``CAP_DB``, count only where all are: their number is arbitrary, and
    would flatter the mean.

    Args:
        values: prompts and dB, one a picture; at least one.
    """
    values = list(values)
    counted = [each for each in values if each[1] < CAP_DB] or values
    by_prompt: dict[Any, list[float]] = {}
    for prompt, decibel in counted:
        by_prompt.setdefault(prompt, []).append(decibel)
    return *mean_and_error(by_prompt), min(decibel for _, decibel in counted)


def _summed(timed: Timed, pictures: Sequence[Picture], device: str, model: str) -> Summed:
    decibels = [(p.prompt, p.psnr_db) for p in pictures if p.psnr_db is not None]
    finite = len(decibels) == len(pictures) > 0
    mean, error, worst = mean_psnr(decibels) if finite else (None, None, None)
    names = pictures[0].measures if finite and pictures else ()  # a mean of the others flatters
    scores = {name: statistics.fmean(p.measures[name] for p in pictures) for name in names}
    return Summed(
        model=model,
        method=timed.method,
        family=timed.family,
        device=device,
        seconds=round(timed.seconds, 4),
        dense_seconds=round(timed.dense_seconds, 4),
        speedup=round(timed.dense_seconds / timed.seconds, 3),
        psnr_db="not finite" if mean is None else round(mean, 2),
        psnr_error="" if error is None else round(error, 2),
        worst_psnr_db="not finite" if worst is None else round(worst, 2),
        ssim=_mean([p.ssim for p in pictures], 5),
        temporal_db=_mean([p.temporal_db for p in pictures], 2),
        computed=_mean([p.computed for p in pictures], 2),
        flops_skipped=_mean([p.flops_skipped for p in pictures], 4),
        attention_spent=_mean([p.attention_spent for p in pictures], 4),
        prompts=len({p.prompt for p in pictures}),
        seeds=len({p.seed for p in pictures}),
        measures=" ".join(f"{name}={value:.4f}" for name, value in scores.items()),
        commit=commit(),
    )


def _mean(values: Sequence[float | None], digits: int) -> float | str:
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), digits) if known else ""


def _show(value: Any, width: int = 6, digits: int = 1) -> str:
    text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
    return f"{text:>{width}}"
