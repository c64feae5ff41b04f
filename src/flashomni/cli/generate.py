"""``flashomni generate``: a picture or a video, on one card or on several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashomni.cli._common import (
    BackendName,
    CfgName,
    DeviceName,
    DtypeName,
    UlyssesName,
    bar_name,
    check_prompt,
    command_line,
    console,
    load_model,
    pick_device,
    plain_errors,
    progress_bars,
    say,
    status,
)
from flashomni.util.files import check_folder

if TYPE_CHECKING:
    from flashomni.engine import Recipe, Summary
    from flashomni.parallel.launch import Place


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to generate; the model's own if left out.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="tiny-image, tiny-video, tiny-wan, a diffusers folder, or a Hub id.")
    ] = "tiny-image",
    recipe: Annotated[
        str, typer.Option(help="A name of `flashomni show recipe`, or a recipe's .json.")
    ] = "balanced",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the stock pipeline too, and report both.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.")] = Path("out"),
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
    ulysses: UlyssesName = 1,
    cfg: CfgName = 1,
) -> None:
    """Generate a picture or a video, accelerated; with --compare against the stock pipeline.

    On several ranks, under torchrun, the first one writes and speaks for all.
    """
    with plain_errors():
        from flashomni.engine import Recipe
        from flashomni.parallel.launch import joined

        chosen = Recipe.of(recipe)
        target = pick_device(device)
        check_prompt(prompt)
        check_folder("out", out)
        with joined(ulysses * cfg, target) as place:
            if place.rank:
                console.quiet = True
            ranks = {"ulysses": ulysses, "cfg": cfg} if place.size > 1 else {}
            work = Work(model, prompt, seed, steps, dtype, backend, ranks)
            _run(work, chosen, place, compare, out)


@dataclass(frozen=True)
class Work:
    """What to generate.

    Args:
        model: name or path.
        prompt: the model's own where there is none.
        seed: of the initial noise.
        steps: the model's own where there is none.
        dtype: name.
        backend: of the kernels.
        ranks: what ``accelerate`` is told of them.
    """

    model: str
    prompt: str | None
    seed: int
    steps: int | None
    dtype: str
    backend: str | None
    ranks: dict[str, int]


def _run(work: Work, chosen: Recipe, place: Place, compare: bool, out: Path) -> None:
    """Generate on this rank; the first one writes."""
    target, model, backend = place.device, work.model, work.backend
    loaded = load_model(model, target, work.dtype)

    from flashomni.lab.generation import Generation, errors_by_step
    from flashomni.lab.versions import versions

    generation = Generation(loaded, work.prompt, work.seed, work.steps, work.ranks)
    say((model, "bold"), f" on {_where(place)}: {generation.prompt!r}")
    if not loaded.trained:
        say("its weights are random: the picture is noise, speed is not affected")
    with progress_bars() as progress:

        def bar(name: str) -> Any:
            task = progress.add_task(bar_name(name), total=generation.num_steps)
            return lambda step, total: progress.update(task, completed=step, total=total)

        generation.warm_up()
        compiling = generation.compile_kernels(chosen, lambda: bar("warm-up"), backend)
        dense = generation.dense(bar("dense")) if compare else None
        latents = generation.latents
        pixels, seconds, summary = generation.accelerated(chosen, bar(chosen.name), backend)
    if place.size > 1:
        summary = _of_all(summary, seconds)
    if place.rank:
        return
    if compiling:
        say(f"warm-up: {compiling:.1f} s, in which kernels compiled; not counted")
    if generation.repeats:
        say("nor are two accelerated generations before the one that is timed: CUDA graphs")

    from flashomni.lab import report

    if dense is None:
        path = report.keep_pictures({"accelerated": pixels}, out)
        say(str(summary))
        say(f"{seconds:.1f} s, written to {path}")
        if not pixels.isfinite().all():
            raise RuntimeError(f"values that are not finite are black in {path}")
        return
    comparison = report.Comparison(
        model=model,
        prompt=generation.prompt,
        seed=work.seed,
        call=generation.call,
        dense=dense[0],
        accelerated=pixels,
        seconds_dense=dense[1],
        seconds_accelerated=seconds,
        dense_call_seconds=dense[2],
        summary=summary,
        versions=versions(target),
        seconds_warm_up=compiling,
        command=command_line(),
        errors_by_step=errors_by_step(latents, generation.latents),
    )
    with status("writing the report"):
        _write_report(comparison, out)
    report.print_table(comparison, console)
    say(f"report: {out / 'report.html'}")
    if not (pixels.isfinite().all() and dense[0].isfinite().all()):
        raise RuntimeError(f"values that are not finite are black in the pictures of {out}")


def _write_report(comparison: Any, out: Path) -> None:
    """The report; if it cannot be written after all the work, at least the pictures.

    Raises:
        RuntimeError: it could not; the message says where the pictures are.
    """
    from flashomni.lab import report

    try:
        report.write_report(comparison, out)
    except Exception as error:
        pictures = {"dense": comparison.dense, "accelerated": comparison.accelerated}
        path = report.keep_pictures(pictures, out)
        raise RuntimeError(
            f"the report could not be written: {error}; the pictures are in {path.parent}"
        ) from error


def _where(place: Place) -> str:
    return str(place.device) if place.size == 1 else f"{place.size} ranks, {place.device.type}"


def _of_all(summary: Summary, seconds: float) -> Summary:
    """The first rank's summary, with the time of every rank."""
    from flashomni.parallel.launch import gathered

    times = ", ".join(f"{each:.2f} s" for each in gathered(seconds))
    return replace(summary, notes=[*summary.notes, f"seconds by rank: {times}"])
