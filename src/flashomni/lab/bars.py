"""A bar for what takes minutes, in a terminal or a notebook."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flashomni.util.words import one_line


def progress(console: Console, disable: bool = False) -> Progress:
    """Bars with counts and times; descriptions are text, not markup."""
    return Progress(
        TextColumn("{task.description:12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )


class Bar:
    """One bar that follows a function of the library: the functions draw nothing themselves.

    It is an ``on_progress`` of :func:`flashomni.tune` and an ``on_method`` of
    :func:`flashomni.compare`::

        with flashomni.Bar() as bar:
            flashomni.tune(pipe, prompts, target_speedup=2.5, on_progress=bar)

    In a notebook it is drawn in the cell, and where nobody watches, as in a log file, not at all.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = Console() if console is None else console
        seen = console.is_terminal or console.is_jupyter
        self._bars = progress(console, disable=not seen)
        self._task = self._bars.add_task("", total=None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say where it is: what runs, how much of it is done, and of how much."""
        text = one_line(stage, 32)
        self._bars.update(self._task, description=text, completed=done, total=total or None)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()
