"""Checks in processes of their own, one after the other: what hangs or dies ends alone.

Each result is a JSON file as soon as it is known, and what has one is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashomni.util.files import write_text

Row = dict[str, Any]


def path_of(folder: Path, name: str) -> Path:
    """Where the result of a case is."""
    return folder / f"{name.replace('/', '--')}.json"


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
) -> Iterator[tuple[int, Row]]:
    """Run what has no result yet.

    Args:
        cases: by name.
        folder: where results are kept.
        timeout: seconds that a case may take.
        again: run what has a result too.
        until: ``time.time()`` after which no further case is begun.

    Yields:
        How many cases are done, and the row of each that ran.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for done, (name, case) in enumerate(cases.items(), 1):
        path = path_of(folder, name)
        if path.exists() and not again:
            continue
        if until is not None and time.time() > until:
            return
        case.warm()
        row = {"case": name, **_alone(case.run, timeout)}
        write_text(path, json.dumps(row, indent=1) + "\n")
        yield done, row


def read_all(folder: Path) -> list[Row]:
    """Every result of a folder, by name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def _alone(run: Callable[[], Row], timeout: float) -> Row:
    """Run a case in a fork of this process, which has imported what takes long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(run, theirs), daemon=True)
    began = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return {"status": "not run", "why": f"took more than {timeout:g} s"}
        row = ours.recv()
    except EOFError:
        process.join()
        return {"status": "not run", "why": f"its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        ours.close()
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def _child(run: Callable[[], Row], pipe: Any) -> None:
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
