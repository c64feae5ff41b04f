"""The grids of a model's calls: their constants are made once, not in every call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols import Grid

MAX_GRIDS = 16  # lengths of prompts, and what else changes from one generation to the next


class Grids:
    """The last grids that were asked for; bits of text and the like cost some twenty launches.

    They are kept by stream: on another one they might not be there yet. A call that is captured,
    here or by the calling code, finds what was made before and adds nothing: until the first
    replay nothing of it is computed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, Grid] = {}

    def on(self, device: torch.device) -> Callable[..., Grid]:
        """:meth:`get` for a call that starts on the current stream of the device."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return functools.partial(self.get, (device, stream))

    def get(
        self,
        where: tuple[torch.device, int],
        seqlen: int,
        text: tuple[int, int],
        blocks: tuple[int, int],
        place: tuple[tuple[str, Any], ...],
        kv_len: Tensor | None,
    ) -> Grid:
        """The grid of a sequence.

        Args:
            where: device and stream.
            seqlen: of queries and keys.
            text: as in :class:`Grid`, like ``kv_len``.
            blocks: ``(block_m, block_n)``.
            place: other arguments of :class:`Grid`, by name.
        """
        key: tuple[Any, ...] = (where, seqlen, text, blocks, place)
        grid = self._known.pop(key, None)
        is_new = grid is None
        if grid is None:
            grid = Grid(seqlen, seqlen, text, *blocks, **dict(place))
        captures = where[0].type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not (captures and is_new):
            self._known[key] = grid  # the one that was used last is dropped last
        if len(self._known) > MAX_GRIDS:
            del self._known[next(iter(self._known))]
        return grid.with_kv_len(kv_len, apart=captures)
