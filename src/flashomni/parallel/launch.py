"""This process among those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)  # a rank that failed leaves the others waiting: they end then


class Place(NamedTuple):
    """One process of several.

    Args:
        rank: from 0.
        size: how many there are.
        device: what it computes on.
    """

    rank: int
    size: int
    device: torch.device


@contextmanager
def joined(size: int, device: torch.device) -> Iterator[Place]:
    """Join the processes that torchrun started; one alone needs none.

    Args:
        size: how many there have to be.
        device: the kind of device: each process of a host has its own GPU.

    Raises:
        ValueError: there are others.
    """
    if size == 1:
        yield Place(0, 1, device)
        return
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != size:
        raise ValueError(
            f"ulysses times cfg is {size}, and there are {found} processes: start them with "
            f"torchrun --nproc-per-node {size} -m flashomni ..."
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    ready = device if device.type == "cuda" else None
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, device_id=ready
    )
    try:
        yield Place(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def gathered(value: float) -> list[float]:
    """A number of every rank, in their order; its own alone where there is but one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
