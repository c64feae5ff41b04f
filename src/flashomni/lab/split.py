"""Prompts to choose settings on, prompts to report on, and prompts nobody looks at: ``split.json``.

A setting chosen on the prompts that it is reported on looks better than it is. Every evaluation and
every study takes its prompts from here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

PARTS = ("tune", "report")
FILE = Path(__file__).parent / "split.json"


def pick(
    model: str, prompts: Sequence[str], part: str = "report", count: int | None = None
) -> list[str]:
    """The prompts of one part; of a model that the file does not name, all.

    Args:
        model: as ``zoo.load`` takes it.
        prompts: all of the model's own.
        part: one of ``PARTS``.
        count: only so many, the first ones.

    Raises:
        ValueError: there is no such part, or the list is shorter than the file says.
    """
    if part not in PARTS:
        raise ValueError(f"split must be one of {', '.join(PARTS)}, got {part!r}")
    ranges = json.loads(FILE.read_text(encoding="utf-8")).get(model)
    if ranges is None:
        return list(prompts[:count])
    start, stop = ranges[part]
    if len(prompts) < stop:
        raise ValueError(
            f"prompts of {model} must be at least {stop} for the split {part!r}, got {len(prompts)}"
        )
    return list(prompts[start:stop][:count])
