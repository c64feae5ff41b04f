"""What all commands share: the console, errors in one sentence, devices, progress.

Exit codes: 0; 1 where the work failed or its result is not sound; 2 for a mistake of the user.
``FLASHOMNI_DEBUG=1`` shows the traceback of any error.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashomni.util.words import clean, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from flashomni.lab.zoo import Loaded

# Nothing that is printed is read as markup: most of it was typed by somebody.
console = Console(markup=False, emoji=False, highlight=False)
DeviceName = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeName = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BackendName = Annotated[
    str | None, typer.Option(help="Take exactly this one; `flashomni show backends` lists them.")
]
MeasureNames = Annotated[
    list[str] | None,
    typer.Option(
        help="Beside PSNR, SSIM and FLIP: lpips=FILE, clip=FOLDER, NAME=MODULE:FUNCTION; may be "
        "repeated."
    ),
]
UlyssesName = Annotated[
    int, typer.Option(help="Ranks that share a sequence, under torchrun.", min=1)
]
CfgName = Annotated[
    int, typer.Option(help="Branches of guidance that run at once, under torchrun.", min=1)
]
DEBUG = "FLASHOMNI_DEBUG"


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table of plain cells."""
    table = Table(*columns, title=Text(clean(title)))
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console.print(table)


def say(*parts: str | tuple[str, str]) -> None:
    """Print text as it is, control characters escaped; a pair is text and its style."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    line = Text.assemble(*((clean(text), style) for text, style in pairs))
    console.print(line, soft_wrap=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What goes wrong ends in one sentence, not in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except typer.Exit:
        raise
    except (ValueError, NotImplementedError) as error:
        _fail(str(error), 2, error)
    except OSError as error:
        _fail(_os_error(error), 1, error)
    except (RuntimeError, MemoryError) as error:
        _fail(_run_error(error), 1, error)


def _fail(message: str, code: int, error: BaseException) -> None:
    if os.environ.get(DEBUG, "") not in ("", "0"):
        raise error
    line = Text.assemble(("error:", "bold red"), " ", clean(message) or type(error).__name__)
    errors = Console(stderr=True, markup=False, emoji=False, highlight=False)
    errors.print(line, soft_wrap=True)
    raise typer.Exit(code) from error


def _os_error(error: OSError) -> str:
    if error.strerror is None:
        return str(error) or type(error).__name__
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}"


def _run_error(error: BaseException) -> str:
    """The first lines of an error of torch or Python, and what to try."""
    text = one_line(error, 500) or type(error).__name__
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        text += (
            "; the device has too little memory: try --dtype bfloat16, a smaller picture, "
            "or a recipe that keeps its cache in host memory (history_device)"
        )
    return f"{text} (set {DEBUG}=1 to see where)"


def check_prompt(prompt: str | None) -> None:
    """Refuse text that no tokenizer can read.

    Raises:
        ValueError: it holds bytes that are not of the terminal's encoding.
    """
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt must be valid Unicode text, got {prompt[:80]!r}") from error


def check_csv(csv: Path | None, plot: Path | None = None) -> None:
    """Try the files that results go to.

    Raises:
        ValueError: one cannot be written.
    """
    from flashomni.util.files import check_file

    if csv is not None:
        check_file("csv", csv)
    if plot is not None:
        check_file("plot", plot)


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


def status(text: str) -> Any:
    """A spinner beside a text while something takes its time; nothing where nobody watches."""
    if not console.is_terminal:
        return contextlib.nullcontext()
    return console.status(Text(one_line(text, 100)))


def load_model(name: str, device: torch.device, dtype: str) -> Loaded:
    """The pipeline of ``--model``, in the dtype of ``--dtype``.

    Raises:
        ValueError: there is none of that name, or it cannot be loaded.
    """
    with status(f"loading {name}"):
        quiet()
        from flashomni.lab import zoo

        return zoo.load(name, device, pick_dtype(dtype, device))


def progress_bars() -> Any:
    """Bars of what runs; nothing where nobody watches. Add tasks by :func:`bar_name`."""
    from flashomni.lab.bars import progress

    return progress(console, disable=not console.is_terminal)


def bar_name(text: object) -> str:
    return one_line(text, 32)


def command_line() -> str:
    """What the user typed; a row of results carries it."""
    return clean(shlex.join(["flashomni", *sys.argv[1:]]))


def measures_of(given: list[str] | None) -> dict[str, str]:
    """What ``--measure`` asks for: names, and where weights or a function are.

    Raises:
        ValueError: it has another form.
    """
    found = {}
    for text in given or ():
        name, equals, where = text.partition("=")
        if text != "flip" and not (name and equals and where):
            raise ValueError(
                f"measure must be flip, NAME=PATH or NAME=MODULE:FUNCTION, got {text!r}"
            )
        found[name] = where
    return found
