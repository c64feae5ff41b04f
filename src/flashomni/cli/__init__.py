"""The command line: ``flashomni generate | compare | eval | tune | studio | show | doctor ...``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import flashomni
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
    show_rows,
    status,
)
from flashomni.cli.bench import bench_app
from flashomni.cli.compare import compare
from flashomni.cli.generate import generate
from flashomni.cli.studio import studio
from flashomni.cli.tune import tune
from flashomni.cli.tune_kernels import tune_kernels
from flashomni.util.files import check_folder
from flashomni.util.words import clean, one_line

app = typer.Typer(
    help="Diffusion transformers that generate faster, and say what they skipped.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(bench_app, name="bench")
app.command()(generate)
app.command()(compare)
app.command()(tune)
app.command()(tune_kernels)
app.command()(studio)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashomni {flashomni.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="The version, and exit."),
    ] = False,
) -> None:
    """Diffusion transformers that generate faster, and say what they skipped."""


class Topic(StrEnum):
    """What ``flashomni show`` can show."""

    recipe = "recipe"
    policies = "policies"
    backends = "backends"
    models = "models"


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Option(help="tiny-image, tiny-video, tiny-wan, a diffusers folder, or a Hub id.")
    ] = "tiny-image",
    method: Annotated[
        list[str] | None,
        typer.Option(help="As of `compare`; may be repeated. A default set if none."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be repeated; the model's own if left out.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many of the model's own prompts.", min=1)] = 4,
    split: Annotated[
        str, typer.Option(help="Which of them: tune (to choose settings on) or report.")
    ] = "report",
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; 0 if none.")] = None,
    scorer: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION that reads a picture and its prompt.")
    ] = None,
    measure: MeasureNames = None,
    out: Annotated[Path, typer.Option(help="Folder for results, pictures, page.")] = Path("eval"),
    csv: Annotated[Path | None, typer.Option(help="Also put the rows into this file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
) -> None:
    """Measure how methods change pictures, and what they save; goes on where it was stopped."""
    with plain_errors():
        target = pick_device(device)
        for text in prompt or ():
            check_prompt(text)
        check_folder("out", out)
        check_csv(csv)
        measures = measures_of(measure)

        from flashomni.lab import fidelity as evaluation
        from flashomni.lab import metrics
        from flashomni.lab import split as splitting
        from flashomni.lab.fidelity.methods import DEFAULTS
        from flashomni.lab.fidelity.page import notes, write_page
        from flashomni.lab.fidelity.scorers import load_scorer

        methods = [evaluation.parse_method(name, backend) for name in method or DEFAULTS]
        judge = None if scorer is None else load_scorer(scorer)
        loaded = load_model(model, target, dtype)
        prompts = prompt or splitting.pick(model, loaded.prompts, split, count)
        with progress_bars() as progress:
            read = progress.add_task(bar_name("MiB of weights"), total=None)
            campaign = evaluation.Campaign(
                model, loaded, methods, prompts, seed or [0], out, judge, steps,
                lambda done, total: progress.update(
                    read, completed=done >> 20, total=total >> 20
                ),
                measures,
            )  # fmt: skip
        with progress_bars() as progress, _says_what_is_kept(campaign, out):
            total = progress.add_task("cases", total=len(campaign))
            current = progress.add_task("", total=1)

            def on_case(case: evaluation.Case) -> Any:
                progress.reset(current, description=bar_name(case.method.name))
                return lambda step, total: progress.update(current, completed=step, total=total)

            for _ in campaign.run(on_case):
                progress.advance(total)
        command = command_line()
        rows = evaluation.summarise(model, campaign.results(), command)
        with status("writing the page"):
            evaluation.save_rows(rows, out / "fidelity.csv")
            if csv is not None:
                evaluation.save_rows(rows, csv)
            page = write_page(campaign, rows, out, command)
        columns = (
            "method", "seconds", "speed-up", "PSNR", "worst", "FLIP", "caption", "FLOPs skipped",
            "scores",
        )  # fmt: skip
        table = Table(
            *columns, title=Text(one_line(f"{model}, {rows[0].device}, {len(prompts)} prompts"))
        )
        table.columns[0].overflow = "fold"
        for row in rows:
            share = row.caption_score
            table.add_row(
                clean(row.recipe),
                f"{row.seconds:.2f}",
                f"{row.speedup:.2f}x",
                f"{row.psnr_db} ± {row.psnr_error}" if row.psnr_error else str(row.psnr_db),
                str(row.worst_psnr_db),
                f"{row.flip:.4f}" if isinstance(row.flip, float) else "",
                f"{share:.1%}" if isinstance(share, float) else "",
                f"{row.flops_skipped:.1%}",
                row.measures,
            )
        console.print(table)
        for note in notes(campaign.results()):
            say(f"note: {note}")
        why = metrics.why_no_lpips()
        if why is not None and "lpips" not in measures:
            say(f"LPIPS not measured: {why}")
        say(f"page: {page}")


@contextmanager
def _says_what_is_kept(campaign: Any, out: Path) -> Iterator[None]:
    """A campaign that stops says what it has: the same command goes on there."""
    try:
        yield
    except BaseException:
        say(f"stopped; {len(campaign.results())} of {len(campaign)} results are kept in {out}")
        raise


@app.command()
def show(
    topic: Annotated[Topic, typer.Argument(help="What to show.")],
    name: Annotated[str | None, typer.Argument(help="Which recipe; all if left out.")] = None,
) -> None:
    """Show recipes, policies and their settings, kernel backends, or supported models."""
    with plain_errors():
        {
            Topic.recipe: _show_recipe,
            Topic.policies: _show_policies,
            Topic.backends: _show_backends,
            Topic.models: _show_models,
        }[topic](name)


def _brief(value: object) -> object:
    """A long list by its ends."""
    if isinstance(value, list) and len(value) > 20:
        return f"[{value[0]}, ..., {value[-1]}]"
    return value


def _show_recipe(name: str | None) -> None:
    import json

    from flashomni.engine import Recipe, presets
    from flashomni.engine.recipe import methods

    if name is not None:
        console.print_json(json.dumps(Recipe.of(name).to_dict()))
        return
    columns = ("recipe", "policy", "schedule", "forecast", "S_q", "settings of the policy")
    table = Table(*columns, title="presets, and recipes of published methods")
    for preset in (*presets(), *methods()):
        recipe = Recipe.of(preset)
        policy, schedule = recipe.policy.to_dict(), recipe.schedule.to_dict()
        settings = {k: v for k, v in policy.items() if k != "name"}
        when = ", ".join(f"{k}={_brief(v)}" for k, v in schedule.items() if k != "name")
        table.add_row(
            preset,
            recipe.policy.name,
            f"{recipe.schedule.name} {when}",
            f"{recipe.forecast.name} {recipe.order}",
            f"{recipe.sparse.degrade_below:g}",
            ", ".join(f"{k}={v}" for k, v in settings.items()),
        )
    console.print(table)


def _show_policies(name: str | None) -> None:
    from flashomni.policies import fields, policies

    table = Table("policy", "what it does", "settings and defaults")
    for known, cls in policies().items():
        if name in (None, known):
            settings = ", ".join(f"{f.name}={f.default}" for f in fields(cls))
            table.add_row(known, (cls.__doc__ or "").splitlines()[0], settings or "none")
    if not table.row_count:
        raise ValueError(f"policy must be one of {', '.join(policies())}, got {name!r}")
    console.print(table)


def _show_backends(name: str | None) -> None:
    from flashomni.lab import doctor

    show_rows(("op", "backend", "here"), doctor.backends(name), "best first")


def _show_models(name: str | None) -> None:
    from flashomni.models import tiers

    table = Table("transformer class", "tier", "what is known of it")
    for cls, (tier, known) in tiers().items():
        if name in (None, cls):
            table.add_row(cls, tier, known)
    if name is None:
        table.add_row("any other", "generic", "blocks found, streams seen in the first call")
    if not table.row_count:
        raise ValueError(f"model must be one of {', '.join(tiers())}, got {name!r}")
    console.print(table)


@app.command()
def doctor(
    pipe_folder: Annotated[
        Path | None, typer.Argument(help="Also what would happen to the pipeline in this folder.")
    ] = None,
) -> None:
    """Versions, device, and which backend each op uses here, with the reasons of the others."""
    with plain_errors():
        from flashomni.lab import doctor as found

        if pipe_folder is not None:
            show_rows(("what", "value"), found.pipeline(pipe_folder), str(pipe_folder))
        show_rows(("what", "version"), found.facts(), "doctor")
        show_rows(("backend", "here", "ops"), found.in_short(), "what runs, and what does not")
        say("op by op: flashomni show backends")
