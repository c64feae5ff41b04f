"""``flashomni tune``: a recipe for a model, a number of steps and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flashomni.cli._common import (
    DeviceName,
    DtypeName,
    bar_name,
    check_prompt,
    command_line,
    console,
    load_model,
    pick_device,
    plain_errors,
    progress_bars,
    say,
)
from flashomni.util.files import check_file
from flashomni.util.words import in_bytes


def tune(
    model: Annotated[
        str, typer.Option(help="tiny-image, tiny-video, tiny-wan, a diffusers folder, or a Hub id.")
    ] = "tiny-image",
    prompts: Annotated[
        Path | None, typer.Option(help="File with a prompt a line; the model's own if left out.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many of the prompts.", min=2)] = 8,
    held_back: Annotated[
        int | None, typer.Option(help="How many of them to validate on; a quarter if left out.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=4)] = None,
    target_speedup: Annotated[float | None, typer.Option(help="So much faster than stock.")] = None,
    target_psnr: Annotated[
        float | None, typer.Option(help="dB against the stock pipeline, on held-back prompts.")
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="A recipe for each of several budgets.")
    ] = False,
    computed: Annotated[
        list[int] | None, typer.Option(help="With --pareto: computed steps. May be repeated.")
    ] = None,
    tries: Annotated[
        int, typer.Option(help="Schedules tried on the real output for each budget.", min=0)
    ] = 4,
    sparse: Annotated[
        int, typer.Option(help="Kinds of sparse attention tried in computed steps.", min=0)
    ] = 8,
    layer_runs: Annotated[
        int, typer.Option(help="Generations that measure them by layer; 0: in all alone.", min=0)
    ] = 32,
    groups: Annotated[
        int, typer.Option(help="Groups of layers with steps of their own; 0: none.", min=0)
    ] = 2,
    memory: Annotated[
        float, typer.Option(help="GiB of host memory that recordings may take.", min=0.001)
    ] = 8.0,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    out: Annotated[Path, typer.Option(help="The recipe's file.")] = Path("recipe.json"),
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> None:
    """Tune a recipe: record, plan, try, and compare with a plain one on prompts kept back.

    Goes on where it was stopped: what is found lies in a folder beside the recipe. Ends with 1, and
    writes no recipe, where a ramp of as many computed steps, what presets have, is not beaten.
    """
    with plain_errors():
        target = pick_device(device)
        check_file("out", out)
        if computed and not pareto:
            raise ValueError("--computed lists the points of a Pareto front: add --pareto")
        given = None if prompts is None else _read(prompts)
        loaded = load_model(model, target, dtype)

        from flashomni.lab import split
        from flashomni.tuning import NotBetterError, Settings
        from flashomni.tuning.page import in_words, of_layers, write_page
        from flashomni.tuning.run import state_folder
        from flashomni.tuning.run import tune as run

        texts = given or split.pick(model, loaded.prompts, "tune")
        texts = texts[:count]
        folder = state_folder(out)
        refusal = None
        with progress_bars() as progress:
            task = progress.add_task("", total=None)

            def show(stage: str, done: int, total: int) -> None:
                progress.update(task, description=bar_name(stage), completed=done, total=total)

            try:
                found = run(
                    loaded.pipe,
                    texts,
                    call=loaded.call,
                    steps=steps,
                    target_speedup=target_speedup,
                    target_psnr=target_psnr,
                    pareto=(computed or True) if pareto else False,
                    held_back=held_back,
                    seed=seed,
                    out=out,
                    settings=Settings(
                        tries=tries,
                        sparse=sparse,
                        layer_runs=layer_runs,
                        groups=groups,
                        memory=int(memory * 2**30),
                    ),
                    on_progress=show,
                    on_note=say,
                )
            except NotBetterError as error:
                refusal, found = error, error.found
        back = texts[-(held_back or max(len(texts) // 4, 1)) :]
        page = write_page(
            found, folder, f"{model}, tuned", back, f"{len(texts)} prompts", command_line()
        )
        console.print(_table(found, model))
        say(
            f"{found.seconds:.0f} s, of which {found.resumed} findings were there already; a "
            f"recording takes {in_bytes(found.bytes_each)}"
        )
        for point in found.points:
            say(in_words(point))
            say(of_layers(point))
        say(f"page: {page}")
        if refusal is not None:
            say((f"refused: {refusal}", "bold red"))
            raise typer.Exit(1)
        say(f"recipe: {out}")


def _read(path: Path) -> list[str]:
    """The prompts in a file, a line each; empty lines and those that begin with # are left out.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts must be a text file, got {str(path)!r}: {error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for text in found:
        check_prompt(text)
    if len(set(found)) < 2:
        raise ValueError(f"prompts must hold at least two different lines, got {str(path)!r}")
    return list(dict.fromkeys(found))


def _table(found: Any, model: str) -> Table:
    columns = (
        "computed", "proposed by", "speed-up", "PSNR", "worst", "ramp", "gain", "ramp, fitted",
        "predicted", "measured",
    )  # fmt: skip
    table = Table(*columns, title=f"{model}, on prompts kept back (predicted, measured: latents)")
    for point in found.points:
        verdict = point.verdict
        same = verdict.same_weights_db
        table.add_row(
            str(point.computed),
            point.source,
            f"{verdict.speedup:.2f}x",
            f"{verdict.psnr_db:.2f}",
            f"{verdict.worst_db:.2f}",
            f"{verdict.ramp_db:.2f}",
            verdict.gain,
            "" if same is None else f"{same:.2f}",
            f"{point.predicted_db:.2f}",
            f"{point.measured_db:.2f}",
        )
    return table
