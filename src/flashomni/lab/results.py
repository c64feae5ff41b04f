"""Rows of measurements and the CSVs that keep them: every table of results is written here.

Rows are dataclasses; their fields are the columns. A file appears whole or not at all, and two
programs that write into one file lose nothing: each reads it anew, under a lock, before it writes.
A text that a spreadsheet would take for a formula gets an apostrophe in front, as spreadsheets
themselves write it; ``read`` takes it off again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashomni.lab.versions import commit, device_name
from flashomni.util.files import locked, write_text

FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
Cells = dict[str, str]


def origin(device: torch.device, command: str) -> dict[str, Any]:
    """The last columns of every row: GPU, versions, commit, command."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "commit": commit(),
        "command": command,
    }


def columns(row: type) -> list[str]:
    """Columns of rows of this class."""
    return [column.name for column in fields(row)]


def cells(row: Any) -> Cells:
    """A row as text; ``None`` is an empty cell."""
    return {name: "" if value is None else str(value) for name, value in asdict(row).items()}


def read(path: str | Path, row: type | None = None) -> list[Cells]:
    """Rows of a CSV as text, by column; none where there is no file.

    Args:
        path: the file.
        row: class of the rows that it must hold; last columns that it has not yet are empty.

    Raises:
        ValueError: the file has other columns, or is no CSV.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names, rows = list(reader.fieldnames or ()), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"csv: {path} cannot be read as one: {error}") from error
    if row is not None and names and names != columns(row)[: len(names)]:
        raise ValueError(f"csv: {path} has other columns; allowed are {', '.join(columns(row))}")
    for line in rows:
        if None in line or None in line.values():
            raise ValueError(f"csv: {path} has a line with more or fewer cells than columns")
    later = dict.fromkeys(columns(row)[len(names) :], "") if row is not None else {}
    return [{name: _plain(value) for name, value in line.items()} | later for line in rows]


def text(names: Sequence[str], rows: Sequence[Cells]) -> str:
    """Rows as a CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _safe(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def append(path: str | Path, rows: Sequence[Any]) -> None:
    """Put rows of one kind at the end of a CSV.

    Raises:
        ValueError: the file has other columns.
    """
    if rows:
        _change(path, type(rows[0]), lambda old: [*old, *map(cells, rows)])


def replace(path: str | Path, rows: Sequence[Any], key: Sequence[str]) -> None:
    """:func:`append`, after taking out older rows that agree with a new one in the ``key``.

    Raises:
        ValueError: the file has other columns.
    """
    new = [cells(row) for row in rows]
    keys = {tuple(row[name] for name in key) for row in new}

    def change(old: list[Cells]) -> list[Cells]:
        return [row for row in old if tuple(row[name] for name in key) not in keys] + new

    if rows:
        _change(path, type(rows[0]), change)


class Book:
    """A CSV whose rows of this run are written anew whenever there are more: an end costs none.

    Args:
        path: what is there already, or comes from others meanwhile, stays.
        row: class of the rows.

    Raises:
        ValueError: the file has other columns.
    """

    def __init__(self, path: Path, row: type) -> None:
        self.path, self._row, self._written = path, row, list[Cells]()
        read(path, row)

    def write(self, rows: Sequence[Any]) -> None:
        """Put ``rows`` in the place of those that this book wrote before."""
        new, mine = [cells(row) for row in rows], self._written

        def change(old: list[Cells]) -> list[Cells]:
            kept = list(reversed(old))  # the last of equal rows are ours
            for row in mine:
                if row in kept:
                    kept.remove(row)
            return [*reversed(kept), *new]

        if rows or mine:
            _change(self.path, self._row, change)
            self._written = new


def _change(path: str | Path, row: type, change: Callable[[list[Cells]], list[Cells]]) -> None:
    """Read, change and write a file while nobody else does."""
    target = Path(os.path.realpath(path))
    with locked(target.parent):
        write_text(path, text(columns(row), change(read(path, row))))


def _safe(value: str) -> str:
    return f"'{value}" if value.startswith(FORMULA) and not _number(value) else value


def _plain(value: str) -> str:
    return value[1:] if value.startswith("'") and value[1:].startswith(FORMULA) else value


def _number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
