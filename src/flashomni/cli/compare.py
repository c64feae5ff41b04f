"""``flashomni compare``: methods side by side, and each against the best rival at equal time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flashomni.cli._common import (
    BackendName,
    DeviceName,
    DtypeName,
    MeasureNames,
    bar_name,
    check_csv,
    check_prompt,
    command_line,
    console,
    load_model,
    measures_of,
    pick_device,
    plain_errors,
    progress_bars,
    say,
)
from flashomni.util.files import check_folder
from flashomni.util.words import clean


def usual_rivals(num_steps: int) -> list[str]:
    """The stock pipeline with fewer steps, and MagCache: by threshold, and on our own ramp."""
    from flashomni.engine import Recipe, StepKind

    plan = Recipe.of("balanced").plan(num_steps)
    assert plan is not None
    live = [step for step, kind in enumerate(plan.kinds) if kind is not StepKind.DISPATCH]
    fewer = dict.fromkeys(f"steps={max(num_steps * share // 28, 1)}" for share in (20, 14, 10))
    ramp = str(live).replace(" ", "")
    return [
        *fewer, "diffusers.mag:threshold=.12", "diffusers.mag:threshold=.24",
        f"diffusers.mag:steps={ramp}",
    ]  # fmt: skip


def compare(
    methods: Annotated[
        list[str],
        typer.Argument(
            help="Recipes; steps=N, the stock pipeline with fewer; peers, which are methods of "
            "others (diffusers.mag:threshold=.06)."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="tiny-image, tiny-video, tiny-wan, a diffusers folder, or a Hub id.")
    ] = "tiny-image",
    rival: Annotated[
        list[str] | None,
        typer.Option(
            help="Compared with each method at equal time; may be repeated. Fewer steps and "
            "MagCache if none."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be repeated; the model's own if left out.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many of the model's own prompts.", min=1)] = 4,
    seed: Annotated[
        list[int] | None, typer.Option(help="May be repeated; 0 and 1 if none.")
    ] = None,
    measure: MeasureNames = None,
    batch: Annotated[int, typer.Option(help="Prompts in one call that is not timed.", min=1)] = 1,
    csv: Annotated[Path | None, typer.Option(help="Also put the rows into this file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page with pictures; none if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
) -> None:
    """Compare methods on many prompts and seeds: mean, worst, and differences at equal time.

    Differences are paired, picture by picture; errors are standard errors over prompts.
    """
    with plain_errors():
        target = pick_device(device)
        for text in prompt or ():
            check_prompt(text)
        check_csv(csv)
        if out is not None:
            check_folder("out", out)
        asked = measures_of(measure)
        loaded = load_model(model, target, dtype)

        from flashomni.lab import split
        from flashomni.lab.fidelity.compare import compare as run
        from flashomni.lab.fidelity.compare_page import PROMPTS, Shown, write_page
        from flashomni.lab.fidelity.measures import usual_measures
        from flashomni.lab.versions import versions

        usual = usual_rivals(steps or int(loaded.call.get("num_inference_steps", 50)))
        rivals = [name for name in rival or usual if name not in methods]
        prompts = list(prompt or split.pick(model, loaded.prompts, "report", count))
        shown = Shown(len(methods) + len(rivals), 0 if out is None else PROMPTS)
        with progress_bars() as progress:
            task = progress.add_task("methods", total=len(methods) + len(rivals))

            def on_method(name: str, done: int, total: int) -> None:
                progress.update(task, description=bar_name(name), completed=done)

            found = run(
                loaded.pipe,
                [*methods, *rivals],
                prompts,
                seeds=seed or (0, 1),
                call=loaded.call,
                steps=steps,
                batch=batch,
                measures={**usual_measures(), **asked},
                backend=backend,
                on_method=on_method,
                on_picture=shown,
            )
        if csv is not None:
            found.save(csv, model)
        _print(found, methods, rivals)
        if out is not None:
            page = write_page(
                found, shown, out, model=model, prompts=prompts, rivals=rivals, methods=methods,
                command=command_line(), versions=versions(target),
            )  # fmt: skip
            say(f"page: {page}")


def _print(found: Any, methods: list[str], rivals: list[str]) -> None:
    table = Table("method", "seconds", "speed-up", "PSNR", "worst", "SSIM", "computed", "scores")
    table.columns[0].overflow = "fold"
    for row in found.rows:
        error = "" if row.psnr_error == "" else f" ± {row.psnr_error}"
        table.add_row(
            clean(row.method),
            f"{row.seconds:.3f}",
            f"{row.speedup:.2f}x",
            f"{row.psnr_db}{error}",
            str(row.worst_psnr_db),
            str(row.ssim),
            str(row.computed),
            row.measures,
        )
    console.print(table)
    table = Table("at equal time", "against", "dB", "worst", title="paired, best rival")
    for each in found.equal_time(rivals, methods):
        error = "" if each.error_db is None else f" ± {each.error_db}"
        gain = f"{each.gain_db:+}{error}"
        table.add_row(clean(each.method), clean(each.rival), gain, f"{each.worst_db:+}")
    if table.row_count:
        console.print(table)
    else:
        say("no rival is as fast as a method: nothing to compare at equal time")
