"""Checks in processes of their own, some at once: what hangs or dies ends alone.

Each result is a JSON file as soon as it is known, and what has one is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from flashomni.util.files import write_text

Row = dict[str, Any]


def path_of(folder: Path, name: str) -> Path:
    """Where the result of a case is."""
    return folder / f"{name.replace('/', '--')}.json"


VISIBLE, HIDDEN = "CUDA_VISIBLE_DEVICES", "FLASHOMNI_HIDDEN_DEVICES"


def hide_cards() -> None:
    """Let the imports of this process see no card; its cases do.

    A process that has touched CUDA cannot fork others that use it, and what cases import
    (diffusers' tests) asks for cards as it is imported. NVML answers torch without CUDA.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if os.environ.get(VISIBLE) != "" or HIDDEN not in os.environ:  # else they are hidden already
        os.environ[HIDDEN] = os.environ.get(VISIBLE, "all")
    os.environ[VISIBLE] = ""


def show_cards() -> None:
    """Undo ``hide_cards``, in a case."""
    shown = os.environ.pop(HIDDEN, None)
    if shown == "all":
        del os.environ[VISIBLE]
    elif shown is not None:
        os.environ[VISIBLE] = shown


@dataclass(frozen=True)
class Case:
    """``run`` gives a row, in its own process; ``warm`` imports in this one what takes long."""

    run: Callable[[], Row]
    warm: Callable[[], object] = object


def run_all(
    cases: Mapping[str, Case],
    folder: Path,
    timeout: float,
    again: bool = False,
    until: float | None = None,
    at_once: int = 1,
) -> Iterator[tuple[int, Row]]:
    """Run what has no result yet.

    Args:
        cases: by name.
        folder: where results are kept.
        timeout: seconds that a case may take.
        again: run what has a result too.
        until: ``time.time()`` after which no further case is begun.
        at_once: cases that run side by side.

    Yields:
        The number of each case that ran, as it ends, and its row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = deque(
        (number, name, case)
        for number, (name, case) in enumerate(cases.items(), 1)
        if again or not path_of(folder, name).exists()
    )
    running: list[_Running] = []
    try:
        while waiting or running:
            late = until is not None and time.time() > until
            while waiting and len(running) < at_once and not late:
                running.append(_Running(*waiting.popleft(), timeout))
            if not running:
                return
            soonest = min(each.deadline for each in running)
            wait([each.pipe for each in running], max(soonest - time.monotonic(), 0.0))
            for each in [each for each in running if each.over()]:
                running.remove(each)
                row = {"case": each.name, **each.row()}
                write_text(path_of(folder, each.name), json.dumps(row, indent=1) + "\n")
                yield each.number, row
    finally:
        for each in running:
            each.end()


def read_all(folder: Path) -> list[Row]:
    """Every result of a folder, by name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


class _Running:
    """A case in a fork of this process, which has imported what takes long."""

    def __init__(self, number: int, name: str, case: Case, timeout: float) -> None:
        case.warm()
        context = multiprocessing.get_context("fork")
        self.number, self.name, self.timeout = number, name, timeout
        self.pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_child, args=(case.run, theirs), daemon=True)
        self._began = time.monotonic()
        self.deadline = self._began + timeout
        self._process.start()
        theirs.close()

    def over(self) -> bool:
        """Whether it has ended, or has had its time."""
        return self.pipe.poll() or time.monotonic() >= self.deadline

    def row(self) -> Row:
        """What it found, or that it did not; it is gone afterwards."""
        try:
            if not self.pipe.poll():
                return {"status": "not run", "why": f"took more than {self.timeout:g} s"}
            row = self.pipe.recv()
        except EOFError:
            self._process.join()
            return {"status": "not run", "why": f"its process ended with {self._process.exitcode}"}
        finally:
            self.end()
        return {**row, "seconds": round(time.monotonic() - self._began, 1)}

    def end(self) -> None:
        """Stop it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _child(run: Callable[[], Row], pipe: Any) -> None:
    show_cards()
    torch.set_num_threads(1)  # OpenMP's others are not in a fork, and would be waited for
    try:
        row = run()
    except BaseException as error:
        row = {"status": "not built", "why": words(error)}
    pipe.send(row)
    pipe.close()


def words(error: BaseException, limit: int = 900) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"
