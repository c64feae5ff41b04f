"""Tiles of the portable kernels that were tuned on the user's card; only read here.

``flashomni tune-kernels`` writes them into a file of the user's cache folder, by card. They come
before the shipped tables, each entry for itself, and count only with the Triton and the kernels
that they were chosen with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from flashomni.kernels.common import configs
from flashomni.kernels.common.configs import Config

SOURCES = (
    "attention/_key_blocks.py", "attention/portable.py", "common/portable.py",
    "gemm_o/portable.py", "gemm_q/portable.py",
)  # fmt: skip
AGAIN = "`flashomni tune-kernels` chooses anew"


@dataclass(frozen=True)
class Tuned:
    """What a file says.

    Args:
        tables: table -> key -> the configuration that was faster than the shipped one.
        tried: table -> key -> how many times as fast; 1 where the shipped one stayed.
        when: the day of the last choice, ``2026-11-26``; empty where nothing counts.
        ignored: why the file does not count; empty where it does, or where there is none.
    """

    tables: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    when: str = ""
    ignored: str = ""


def cache_folder() -> Path:
    """``$FLASHOMNI_CACHE``, or ``flashomni`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    mine = os.environ.get("FLASHOMNI_CACHE")
    if mine:
        return Path(mine)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashomni"


def file_of(card: str) -> Path:
    """The user's file of a card, by its name."""
    return cache_folder() / "kernels" / f"{configs.slug(card)}.tiles.json"


@functools.cache
def made_with() -> dict[str, str]:
    """What a choice holds for: the compiler, and the kernels by their sources."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((files("flashomni.kernels") / name).read_bytes())
    return {"triton": triton, "kernels": digest.hexdigest()[:12]}


def load(path: Path) -> Tuned:
    """A file; one that cannot be used says why in ``ignored``, and has no tables."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        others = [
            f"{name} {found['made with'].get(name)}, here it is {here}"
            for name, here in made_with().items()
            if found["made with"].get(name) != here
        ]
        if others:
            return Tuned(ignored=f"{path} was made with {', '.join(others)}; {AGAIN}")
        for table in found["tables"].values():
            for entry in table.values():
                _check(Config(**entry))
        for table in found["tried"].values():
            for gain in table.values():
                float(gain)
        return Tuned(found["tables"], found["tried"], str(found["when"]))
    except FileNotFoundError:
        return Tuned()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Tuned(ignored=f"{path} cannot be used: {error!r}; {AGAIN}")


def _check(config: Config) -> None:
    for name, value in zip(Config._fields[:4], config[:4], strict=True):
        lowest = 1 if name == "num_warps" else 16
        if type(value) is not int or not lowest <= value <= 512 or value & (value - 1):
            raise ValueError(f"{name} must be a power of two from {lowest} to 512, got {value!r}")
    if type(config.num_stages) is not int or not 1 <= config.num_stages <= 8:
        raise ValueError(f"num_stages must be from 1 to 8, got {config.num_stages!r}")
    if type(config.anchored) is not bool:
        raise ValueError(f"anchored must be true or false, got {config.anchored!r}")


@functools.cache
def of_card(device: torch.device) -> Tuned:
    """What counts on this card; read once. A file that does not is told of once."""
    found = load(file_of(torch.cuda.get_device_name(device)))
    if found.ignored:
        logging.getLogger("flashomni").warning("%s", found.ignored)
    return found


@functools.cache
def tiles(table: str, device: torch.device, head_dim: int, num_bytes: int) -> Config:
    """The user's configuration, or the shipped one; arguments as of :func:`configs.tiles`."""
    own = of_card(device).tables.get(table, {}).get(key(head_dim, num_bytes))
    if own is not None:
        return Config(**own)
    return configs.tiles(table, configs.places(device), head_dim, num_bytes)


def key(head_dim: int, num_bytes: int) -> str:
    """The key of an entry, as in the shipped tables."""
    return f"head_dim={head_dim} bytes={num_bytes}"


def forget() -> None:
    """Look at the file again: it was written."""
    of_card.cache_clear()
    tiles.cache_clear()
