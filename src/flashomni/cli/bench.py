"""``flashomni bench op NAME``, ``bench kernels``, ``bench e2e`` and ``bench sparsity``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashomni.cli._common import (
    BackendName,
    CfgName,
    DeviceName,
    DtypeName,
    UlyssesName,
    bar_name,
    check_csv,
    command_line,
    console,
    pick_device,
    pick_dtype,
    plain_errors,
    progress_bars,
    say,
)
from flashomni.cli._models import built, profile_parts, timed

if TYPE_CHECKING:
    from flashomni.lab.results import Book


bench_app = typer.Typer(
    no_args_is_help=True,
    help="Speed: of the ops (`bench op attention`, `bench op gemm_q`, ...), of all of them against "
    "their targets (`bench kernels`), of whole generations at real size (`bench e2e`), and of "
    "steps against sparsity (`bench sparsity`).",
)

ModelName = Annotated[
    str,
    typer.Option(
        help="hunyuan-33k, flux-1024, flux-2048, wan22, flux2-1024, z-image-1024, qwen-image-1328, "
        "hunyuan15-720p, ltx2-768; tiny-hunyuan, tiny-flux, tiny-wan22, tiny-flux2, ... for a try."
    ),
]
Structure = Annotated[
    float, typer.Option(help="How far attention is from uniform in the last layer; 0 is as built.")
]
CsvPath = Annotated[Path | None, typer.Option(help="Append the rows to this file.")]
PlotPath = Annotated[Path | None, typer.Option(help="Draw what is in the CSV.")]


@bench_app.command("op")
def bench_op(
    op: Annotated[
        str,
        typer.Argument(
            help="attention (skips key blocks), attention_cached, attention_both, "
            "attention_redone, decode, gemm_q, gemm_q_fused, gemm_o, gemm_o_interval, or symbols."
        ),
    ] = "attention",
    shape: Annotated[str, typer.Option(help="A named problem.")] = "cpu-4096",
    density: Annotated[
        list[float] | None, typer.Option(help="Share to compute; may be repeated.")
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.", min=1)] = 9,
    csv: CsvPath = None,
    plot: PlotPath = None,
) -> None:
    """Time an op against dense ones in the same process, after checking its result."""
    with plain_errors():
        from flashomni.lab import results
        from flashomni.lab.ops.table import OpRow, measure, tabulate_ops
        from flashomni.lab.plot import draw

        _check_plot(plot, csv)
        target = pick_device(device)
        densities = density or [1.0, 0.75, 0.5, 0.25, 0.1]
        for value in densities:
            if not 0.0 < value <= 1.0:
                raise ValueError(f"density must be above 0 and at most 1, got {value}")
        if csv is not None:
            results.read(csv, OpRow)  # other columns are refused before anything is measured
        kind, command = pick_dtype(dtype, target), command_line()
        measured, absent = list[OpRow](), dict[str, str]()
        with progress_bars() as progress:
            task = progress.add_task(bar_name(op), total=len(densities))
            for found, missing in measure(
                op, shape, densities, target, kind, rounds, command, backend
            ):
                measured += found
                absent |= missing
                progress.advance(task)
        console.print(tabulate_ops(measured))
        for name, why in absent.items():
            say(f"{name} not measured: {why}")
        if csv is not None:
            results.append(csv, measured)
            say(f"appended to {csv}")
            if plot is not None:
                draw(csv, plot)


@bench_app.command("kernels")
def bench_kernels(
    part: Annotated[
        list[str] | None, typer.Option(help="attention or gemm; may be repeated. Both if none.")
    ] = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Begin no row after this long.")] = 190.0,
    csv: CsvPath = None,
) -> None:
    """Measure the kernels' table of docs/performance.md and say which targets are met.

    The rows are those of `bench op`, each after a check of its result, and are in the CSV as soon
    as they are measured. An interrupt prints what there is.
    """
    with plain_errors():
        from flashomni.lab.ops.figures import FIGURES, PARTS, measure_figures, tabulate_figures
        from flashomni.lab.ops.table import OpRow

        check_csv(csv)
        for name in part or ():
            if name not in PARTS:
                raise ValueError(f"part must be one of {', '.join(PARTS)}, got {name!r}")
        target = pick_device(device)
        figures = tuple(figure for figure in FIGURES if figure.part in (part or PARTS))
        book = _book(csv, OpRow)
        kind, command = pick_dtype(dtype, target), command_line()
        rows, found, absent = list[OpRow](), [], dict[str, str]()
        try:
            with progress_bars() as progress:
                task = progress.add_task("figures", total=len(figures))
                for new, values, missing in measure_figures(
                    figures, target, kind, rounds, seconds, command, backend
                ):
                    rows += new
                    found += values
                    absent |= missing
                    progress.advance(task, len(values))
                    for row in new:
                        progress.console.print(
                            f"{row.op} {row.shape} {row.density:g}: {row.ms:.4f} ms, "
                            f"{row.baseline} {row.baseline_ms:.4f}, {row.ratio:.3f}x",
                            highlight=False,
                        )
                    if book is not None and new:
                        book.write(rows)
        except KeyboardInterrupt:
            say("interrupted: what was measured follows")
        console.print(tabulate_figures(found, rows[0].gpu if rows else "nothing measured"))
        for name, why in absent.items():
            say(f"{name} not measured: {why}")


@bench_app.command("e2e")
def bench_e2e(
    model: ModelName = "tiny-flux",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A preset, a policy or one of these with settings, a recipe's .json, or a peer "
            "(diffusers.taylorseer:cache_interval=6); may be repeated. The presets if none."
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, cudnn, compiled (blocks, with cuDNN attention), compiled-native, fa3, "
            "fa4; may be repeated. eager if none."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of a generation.")] = 50,
    stock_steps: Annotated[
        int, typer.Option(help="Steps run where all are alike; the first does not count.")
    ] = 4,
    whole: Annotated[
        bool, typer.Option("--whole", help="Complete generations of lossless recipes too.")
    ] = False,
    generation: Annotated[
        int, typer.Option(help="Which one of a recipe counts; from the 3rd on CUDA graphs replay.")
    ] = 1,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
    structure: Structure = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, text and noise.")] = 0,
    csv: CsvPath = None,
    plot: PlotPath = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Time nothing; CSV and plot get the parts of a step."),
    ] = False,
    ulysses: UlyssesName = 1,
    cfg: CfgName = 1,
) -> None:
    """Time whole generations of a real-size model with random weights.

    The real diffusers pipeline, its published configuration, text given as random embeddings, no
    VAE. Recipes and peers run one complete generation, after a short one that compiles; stock
    methods run a few steps, before and after the others, and count as steps x median. Densities of
    recipes that look at the data are not those of a trained model: random weights attend evenly
    (--structure makes them less even). With --profile: kernel times by part, of one step of each
    kind. With --ulysses or --cfg, under torchrun: recipes on one card and on all of them, beside
    diffusers' own context parallelism in the same processes; from --generation 3 on with CUDA
    graphs, on one card and on all.
    """
    with plain_errors():
        from flashomni.cli._ranks import bench_ranks
        from flashomni.lab.e2e.breakdown import PartRow
        from flashomni.lab.e2e.methods import Plan, parse_measure, parse_recipe
        from flashomni.lab.e2e.stock import make_stocks
        from flashomni.lab.e2e.table import GenerationRow
        from flashomni.lab.plot import draw

        _check_plot(plot, csv)
        target = pick_device(device)
        plan = Plan(steps, stock_steps, whole, backend, generation)
        if ulysses * cfg > 1:
            if profile or plot is not None:
                raise ValueError("profile and plot are of one card: leave out --ulysses and --cfg")
            build = (model, device, dtype, seed, structure)
            return bench_ranks(build, recipe, baseline, plan, ulysses, cfg, csv)
        baselines = make_stocks(baseline or ["eager"])
        names = recipe or ["lossless", "quality", "balanced", "fast"]
        if profile:
            recipes = dict(parse_recipe(name) for name in names)
            parts = _book(csv, PartRow)
            ready = built(model, target, dtype, seed, structure)
            profile_parts(ready, baselines, recipes, backend, parts)
        else:
            methods = dict(parse_measure(name) for name in names)
            book = _book(csv, GenerationRow)
            ready = built(model, target, dtype, seed, structure)
            timed(ready, baselines, methods, plan, book)
        if plot is not None and csv is not None:
            draw(csv, plot)


@bench_app.command("sparsity")
def bench_sparsity(
    model: ModelName = "tiny-flux",
    point: Annotated[
        list[float] | None,
        typer.Option(help="Share of (query, key) pairs to skip; may be repeated. .1 to .9 if none"),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="FC (query blocks cached), BSS (key blocks skipped) or both; may be repeated. "
            "All if none."
        ),
    ] = None,
    dispatch_steps: Annotated[int, typer.Option(help="Sparse steps of each point.")] = 3,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    backend: BackendName = None,
    structure: Structure = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, text and noise.")] = 0,
    csv: CsvPath = None,
    plot: PlotPath = None,
) -> None:
    """Time of a sparse (Dispatch) step by how much it skips: caching, skipping, both.

    Each point runs one dense step, one Update and a few Dispatch steps of the real pipeline with
    the policy topk; times are divided by our own dense steps. The first run compiles.
    """
    with plain_errors():
        from flashomni.lab.e2e.sparsity import (
            MODES,
            POINTS,
            SparsityRow,
            recipes_for,
            sweep,
            tabulate_sparsity,
        )
        from flashomni.lab.plot import draw

        _check_plot(plot, csv)
        target = pick_device(device)
        points, modes = point or list(POINTS), mode or list(MODES)
        recipes = recipes_for(modes, points, dispatch_steps)
        book = _book(csv, SparsityRow)
        ready = built(model, target, dtype, seed, structure)
        rows: list[SparsityRow] = []
        with progress_bars() as progress:
            task = progress.add_task("points", total=len(recipes))
            for row in sweep(ready, recipes, command_line(), backend):
                rows.append(row)
                progress.advance(task)
                if book is not None:
                    book.write(rows)
        console.print(tabulate_sparsity(rows))
        if plot is not None and csv is not None:
            draw(csv, plot)


def _check_plot(plot: Path | None, csv: Path | None) -> None:
    if plot is not None and csv is None:
        raise ValueError("plot needs csv, which holds what is drawn")
    check_csv(csv, plot)


def _book(csv: Path | None, row: type) -> Book | None:
    """The file for the rows; it is looked at before anything is measured."""
    from flashomni.lab.results import Book

    return None if csv is None else Book(csv, row)
