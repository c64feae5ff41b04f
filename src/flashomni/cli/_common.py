"""What all commands share: the console, errors in one sentence, devices, progress."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

console = Console()
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeName = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BackendName = Annotated[str | None, typer.Option(help="Take exactly this kernel backend.")]


@contextmanager
def plain_errors() -> Iterator[None]:
    """A mistake of the user ends in one sentence, not in a traceback."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu here: torch sees no CUDA device")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise ValueError(f"dtype must be auto, {', '.join(known)}, got {name!r}")
    return known[name]


def quiet() -> None:
    """Our own progress and errors are enough: no bars and notes of the libraries below."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress_bars() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def command_line() -> str:
    """What the user typed; a row of results carries it."""
    return " ".join(["flashomni", *sys.argv[1:]])
