"""One clock for the calls of a transformer, whoever generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flashomni.util.stopwatch import Stopwatch


@contextmanager
def clocked(transformer: nn.Module, device: torch.device) -> Iterator[list[Stopwatch]]:
    """A stopwatch for each call of the transformer, outside of every other hook on it."""
    watches: list[Stopwatch] = []
    handles = [
        transformer.register_forward_pre_hook(
            lambda *_: watches.append(Stopwatch(device)), prepend=True
        ),
        transformer.register_forward_hook(lambda *_: watches[-1].stop()),
    ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()
