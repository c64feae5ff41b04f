"""One clock for the calls of a transformer, whoever generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from flashomni.util.stopwatch import Stopwatch


@contextmanager
def clocked(*transformers: nn.Module, device: torch.device) -> Iterator[list[Stopwatch]]:
    """A stopwatch for each call of the transformers, outside of every other hook on them."""
    watches: list[Stopwatch] = []
    handles: list[Any] = []
    for each in transformers:
        start = partial(_start, watches, device)
        handles.append(each.register_forward_pre_hook(start, prepend=True))
        handles.append(each.register_forward_hook(lambda *_: watches[-1].stop()))
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()


def _start(watches: list[Stopwatch], device: torch.device, *_: Any) -> None:
    watches.append(Stopwatch(device))
