"""Tuned configurations of kernels, as data: ``kernels/configs/<name>.json``, read once.

An entry is looked for in up to three files, in this order, each entry for itself:

1. that of the card, ``slug(torch.cuda.get_device_name())``: ``nvidia-h200.json``;
2. that of its architecture: ``sm_90.json``, or ``hip.json`` on a ROCm device;
3. ``default.json``, which has every entry of the portable kernels and needs at most 99 KB of shared
   memory.

A file maps a table (``attention/portable``: the op and the backend) to its entries, and an entry's
key (``head_dim=128 bytes=2``) to the configuration. Tuning a card is a new file with what differs;
``tools/sweep_portable.py`` measures candidates. What ``flashomni tune-kernels`` chose on a user's
card comes before all three: :mod:`.tuned`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import torch

DEFAULT = "default"
Entry = Mapping[str, Any]


class Config(NamedTuple):
    """How a portable kernel tiles: ``tile_n`` keys or features, ``tile_k`` of what is summed over.

    In attention ``tile_k`` is of no meaning: a tile holds the whole head_dim. In GEMM-Q ``tile_n``
    is head_dim: a tile is one head, so that its norm and RoPE stay in registers. ``anchored`` is of
    attention alone: whether the softmax is.
    """

    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    anchored: bool = False


def slug(card: str) -> str:
    """The name of a card as a file's: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


@functools.cache
def places(device: torch.device) -> tuple[str, ...]:
    """The names of the files for a GPU, first the one that is asked first."""
    if torch.version.hip is not None:
        architecture = "hip"
    else:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return slug(torch.cuda.get_device_name(device)), architecture, DEFAULT


def entry(table: str, where: tuple[str, ...], **key: int) -> Entry:
    """The first entry of that key.

    Args:
        table: op and backend, e.g. ``attention/portable``.
        where: the names of the files, as :func:`places` gives them.
        key: what the entries of the table are for, in the order of their keys.

    Raises:
        NotImplementedError: no file has it.
    """
    name = " ".join(f"{field}={value}" for field, value in key.items())
    for place in where:
        found = read(place).get(table, {}).get(name)
        if found is not None:
            return found
    raise NotImplementedError(f"no configuration of {table} for {name} in {', '.join(where)}")


@functools.cache
def read(name: str) -> Mapping[str, Mapping[str, Entry]]:
    """A file: table -> key -> entry; nothing where there is no such file."""
    path = files("flashomni.kernels") / "configs" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.cache
def tiles(table: str, where: tuple[str, ...], head_dim: int, num_bytes: int) -> Config:
    """How a portable kernel tiles for heads of ``head_dim`` and elements of ``num_bytes``."""
    return Config(**entry(table, where, head_dim=head_dim, bytes=num_bytes))
