"""Time between two points, on the CPU's clock or the GPU's."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds between start and stop; on CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._device = device.type == "cuda", device
        self._start, self._stop = self._now(), None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float:
        if self._stop is None:
            return float("nan")
        if not self._cuda:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3

    def allocated(self) -> int | None:
        """Bytes of all tensors on the GPU, by the allocator's own books; ``None`` elsewhere."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else None
