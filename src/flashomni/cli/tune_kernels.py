"""``flashomni tune-kernels``: what is fastest on this card, measured once and remembered."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flashomni.cli._common import (
    DeviceName,
    DtypeName,
    bar_name,
    console,
    pick_device,
    pick_dtype,
    plain_errors,
    progress_bars,
    say,
)

if TYPE_CHECKING:
    import torch

SHARE = 0.8  # of the time is for tiles


def tune_kernels(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="May be repeated; those of the models if none.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="When to stop.", min=1.0)] = 180.0,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
) -> None:
    """Measure once what is fastest on this card, and remember it.

    First the tiles of the portable kernels, the most important first; then whether torch's dense
    attention is faster than ours. Kept in the user's cache folder ($FLASHOMNI_CACHE, or
    ~/.cache/flashomni) for this card and these versions; what is kept stays when it is stopped.
    """
    with plain_errors():
        target = pick_device(device)
        if target.type != "cuda":
            raise NotImplementedError(
                f"tune-kernels chooses between kernels of a GPU, got device {target}"
            )
        for dim in head_dim or ():
            if not 1 <= dim <= 256:
                raise ValueError(f"head_dim must be from 1 to 256, got {dim}")
        end = time.monotonic() + seconds
        kind = pick_dtype(dtype, target)
        _tiles(target, kind, head_dim, SHARE * seconds)
        _dense(target, kind, head_dim, end)


def _tiles(
    device: torch.device, dtype: torch.dtype, head_dims: list[int] | None, seconds: float
) -> None:
    import torch

    from flashomni.kernels import refusals
    from flashomni.lab.ops.tiles import HEAD_DIMS, Keeper, tasks, tune
    from flashomni.lab.ops.tiles_bench import GpuBench, shared_memory
    from flashomni.lab.versions import commit

    why = refusals("attention").get("portable")
    if why is not None:
        raise NotImplementedError(f"the portable kernels cannot be tuned: {why}")
    keeper = Keeper(torch.cuda.get_device_name(device), commit())
    if keeper.ignored:
        say(keeper.ignored)
    wanted = dict.fromkeys(max(16, 1 << (dim - 1).bit_length()) for dim in head_dims or HEAD_DIMS)
    table = Table("op", "head_dim", "tile", "warps", "stages", "candidates", "gain")
    say(f"tiles of the portable kernels, at most {seconds:.0f} s; kept in {keeper.path}")
    try:
        with progress_bars() as bars:
            bar = bars.add_task("", total=None)

            def on_progress(done: int, total: int, what: str) -> None:
                bars.update(bar, completed=done, total=total, description=bar_name(what))

            for found in tune(
                tasks(dtype.itemsize, list(wanted)), GpuBench(device, dtype), shared_memory(device),
                seconds=seconds, tell=say, on_progress=on_progress,
            ):  # fmt: skip
                keeper.keep(found)
                if found.config is None:
                    say(f"{found.task}: no configuration runs right here")
                    continue
                tile = "x".join(map(str, found.config[:3]))
                cells = (found.config.num_warps, found.config.num_stages, found.tried)
                gain = "shipped" if found.config == found.shipped else f"{found.gain:.2f}x"
                op, dim = found.task.op, str(found.task.head_dim)
                table.add_row(op, dim, tile, *map(str, cells), gain)
    finally:
        if table.row_count:
            console.print(table)


def _dense(
    device: torch.device, dtype: torch.dtype, head_dims: list[int] | None, end: float
) -> None:
    from flashomni.kernels.attention._measured import is_faster
    from flashomni.lab.ops.dense import HEAD_DIMS, measure_dense

    table = Table("dtype", "head_dim", "tokens", "backend", "ms", "torch's ms", "runs")
    for row in measure_dense(device, [dtype], head_dims or HEAD_DIMS):
        runs = row.backend
        if is_faster({"ours_ms": row.ours_ms, "sdpa_ms": row.sdpa_ms}):
            runs = "sdpa"
        cells = (row.head_dim, row.seqlen, row.backend, row.ours_ms, row.sdpa_ms, runs)
        table.add_row(row.dtype, *map(str, cells))
        if time.monotonic() >= end:
            say("the time is up: dense attention is not measured further; more --seconds would")
            break
    console.print(table)
