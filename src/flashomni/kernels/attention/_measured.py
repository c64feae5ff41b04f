"""Which dense calls torch's own attention was measured to be faster at, by card; only read here.

Shipped measurements are entries ``attention/sdpa`` of ``kernels/configs/<card>.json``. Those of a
user are in a file of the user's cache folder, which ``flashomni tune-kernels`` writes, and count
only with the torch, Triton and driver that they were made with.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flashomni
from flashomni.kernels.common.configs import places, read, slug
from flashomni.kernels.common.tuned import cache_folder

TABLE = "attention/sdpa"
NOISE = 0.98  # a difference below 2 % is none
SHORTEST = 1024  # tokens; nobody waits for less


def remembered(card: str) -> Path:
    """The user's file of a card, by its name."""
    return cache_folder() / "kernels" / f"{slug(card)}.json"


def made_with() -> dict[str, str]:
    """What a measurement holds for."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        "torch": torch.__version__,
        "triton": triton,
        "driver": str(driver),
        "flashomni": flashomni.__version__,
    }


def key(dtype: torch.dtype, head_dim: int, seqlen: int) -> str:
    """The entry of a shape; lengths count by their largest power of two."""
    name = str(dtype).removeprefix("torch.")
    return f"dtype={name} head_dim={head_dim} tokens={1 << (seqlen.bit_length() - 1)}"


def is_faster(entry: Mapping[str, float] | None) -> bool:
    """Whether torch was, by more than noise."""
    return entry is not None and entry["sdpa_ms"] < NOISE * entry["ours_ms"]


def sdpa_is_faster(
    device: torch.device, dtype: torch.dtype, head_dim: int, seqlen_q: int, seqlen_kv: int
) -> bool:
    """What was measured of such a call on this card; ``False`` where nothing was.

    Only self-attention is measured: of a cross-attention with another length nothing is known.
    """
    if min(seqlen_q, seqlen_kv) < SHORTEST or seqlen_q.bit_length() != seqlen_kv.bit_length():
        return False
    return is_faster(entries(device).get(key(dtype, head_dim, seqlen_kv)))


@functools.cache
def entries(device: torch.device) -> Mapping[str, Mapping[str, float]]:
    """All that is known of a card: shipped, then what the user measured. Read once."""
    shipped = read(places(device)[0]).get(TABLE, {})
    return {**shipped, **of_user(remembered(torch.cuda.get_device_name(device)))}


def of_user(path: Path) -> dict[str, Any]:
    """The entries of a user's file; none if it was made with other versions or is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["made with"] != made_with():
            return {}
        table = found[TABLE]
        for entry in table.values():
            is_faster(entry)
        return table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.getLogger("flashomni").warning(
            "%s cannot be used, `flashomni tune-kernels` writes it anew: %s", path, error
        )
        return {}
