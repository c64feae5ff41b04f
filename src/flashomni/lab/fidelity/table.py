"""From results to one row a method, and to the CSV that documents quote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flashomni.lab import results as files
from flashomni.lab.fidelity.comparison import mean_psnr
from flashomni.lab.fidelity.judged import CAP_DB
from flashomni.lab.fidelity.result import Result

IDENTICAL = "identical"
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class Row:
    """One method on one model: medians of times, means of fidelity. Empty where not measured.

    ``psnr_db`` is the mean over prompts of means over seeds, ``psnr_error`` its standard error over
    prompts, ``worst_psnr_db`` the lowest, as ``flashomni compare`` has them, without identical
    pictures. Mean and worst are ``identical`` where every picture is, or ``not finite``
    where one has such values: then there is no fidelity, and no mean of the others, which would
    flatter. ``caption_score`` is the share of right statements, ``dense_caption_score`` that of the
    stock pipeline's pictures; ``temporal_db`` the PSNR of changes from frame to frame;
    ``measures`` the means of further scores.
    """

    model: str
    recipe: str
    device: str
    seconds: float
    speedup: float
    psnr_db: float | str
    ssim: float | str
    lpips: float | str
    caption_score: float | str
    flops_skipped: float
    seeds: str
    commit: str
    family: str
    steps: int
    generations: int
    dense_seconds: float
    worst_psnr_db: float | str
    temporal_db: float | str
    dense_caption_score: float | str
    torch: str
    diffusers: str
    command: str
    flip: float | str = ""
    psnr_error: float | str = ""
    measures: str = ""


def summarise(model: str, results: Sequence[Result], command: str) -> list[Row]:
    """One row a method, in the order in which methods appear, the stock pipeline first."""
    if not results:
        return []
    names = list(dict.fromkeys(result.method for result in results))
    groups = {name: [r for r in results if r.method == name] for name in names}
    rows = [_row(model, group, command) for group in groups.values()]
    return [_dense_row(rows[0], results), *rows]


def _row(model: str, group: list[Result], command: str) -> Row:
    first = group[0]
    sound = [] if any(r.failure is not None for r in group) else group
    seeds = sorted({result.seed for result in group})
    mean, error, worst = _decibels(sound)
    return Row(
        model=model,
        recipe=first.method,
        device=first.versions["device"],
        seconds=round(statistics.median(r.seconds for r in group), 3),
        speedup=round(statistics.median(r.speedup for r in group), 3),
        psnr_db=mean,
        ssim=_mean([r.ssim for r in sound if r.ssim is not None], 5),
        lpips=_mean([r.lpips for r in sound if r.lpips is not None]),
        caption_score=_share([r.caption for r in group if r.caption is not None]),
        flops_skipped=round(statistics.fmean(r.flops_skipped for r in group), 4),
        seeds=" ".join(map(str, seeds)),
        commit=first.versions["commit"],
        family=first.family,
        steps=first.steps,
        generations=len(group),
        dense_seconds=round(statistics.median(r.dense_seconds for r in group), 3),
        worst_psnr_db=worst,
        temporal_db=_mean([r.temporal_db for r in sound if r.temporal_db is not None]),
        dense_caption_score=_share([r.dense_caption for r in group if r.dense_caption is not None]),
        torch=first.versions["torch"],
        diffusers=first.versions["diffusers"],
        command=command,
        flip=_mean([r.flip for r in sound if r.flip is not None], 5),
        psnr_error=error,
        measures=" ".join(
            f"{name}={statistics.fmean(r.measures[name] for r in sound):.4f}"
            for name in (sound[0].measures if sound else ())
        ),
    )


def _dense_row(like: Row, results: Sequence[Result]) -> Row:
    """The stock pipeline, from the runs that bracket the others."""
    return Row(
        **{
            **asdict(like),
            "recipe": "dense",
            "family": "stock",
            "seconds": round(statistics.median(r.dense_seconds for r in results), 3),
            "dense_seconds": round(statistics.median(r.dense_seconds for r in results), 3),
            "speedup": 1.0,
            "psnr_db": IDENTICAL,
            "worst_psnr_db": IDENTICAL,
            "ssim": 1.0,
            "lpips": 0.0 if like.lpips != "" else "",
            "flip": 0.0 if like.flip != "" else "",
            "measures": "",
            "psnr_error": "",
            "temporal_db": "",
            "caption_score": like.dense_caption_score,
            "flops_skipped": 0.0,
            "steps": max(r.steps for r in results),
        }
    )


def _decibels(sound: list[Result]) -> tuple[float | str, float | str, float | str]:
    """Mean PSNR, its standard error and the worst, as ``flashomni compare`` has them."""
    if not sound or all(result.psnr_db is None for result in sound):
        word = IDENTICAL if sound else NOT_FINITE
        return word, "", word
    mean, error, worst = mean_psnr(
        (r.prompt, CAP_DB if r.psnr_db is None else r.psnr_db) for r in sound
    )
    return round(mean, 2), "" if error is None else round(error, 2), round(worst, 2)


def _mean(values: list[float], digits: int = 4) -> float | str:
    return round(statistics.fmean(values), digits) if values else ""


def _share(pairs: list[tuple[int, int]]) -> float | str:
    total = sum(count for _, count in pairs)
    return round(sum(right for right, _ in pairs) / total, 4) if total else ""


def save_rows(rows: list[Row], path: str | Path) -> None:
    """Write rows to a CSV; older rows of the same model, method and device are replaced.

    Raises:
        ValueError: the file has other columns.
    """
    files.replace(path, rows, ("model", "recipe", "device"))
