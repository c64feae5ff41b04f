"""How tensors are kept between steps: in which dtype, and on the device or in pinned host memory.

What lies on the host travels on a stream of its own: away while later layers compute, and back
while the layer before computes, so that neither waits as long as a layer takes longer than its
copies. No call here waits for the device.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
IN_FLIGHT = 2  # tensors on their way to the host, whose device memory is still held
PART = 2**25  # bytes of what passes over a large tensor make at a time, where they write into it


def parts(x: Tensor) -> Iterator[slice]:
    """The rows of ``x [B, R, ...]``, so many at a time that a part has about ``PART`` bytes."""
    rows = x.shape[1]
    count = max(1, min(rows, -(-x.nbytes // PART)))
    size = max(1, -(-rows // count))
    return (slice(start, start + size) for start in range(0, rows, size))


class Lane:
    """Copies between a device and pinned host memory, beside the computation.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def room(self, like: Tensor) -> Tensor:
        """Host memory for a tensor of this shape and dtype."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def send(self, value: Tensor, host: Tensor) -> None:
        """``host[:] = value``; the memory of ``value`` is held until that is done."""
        self._release(IN_FLIGHT - 1)
        self._leaving.append((value, self._copy(host, value)))

    def bring(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy of ``host`` on the device, valid after the event, and not to be freed before."""
        value = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return value, self._copy(value, host)

    def wait(self, event: torch.cuda.Event) -> None:
        """What is launched from now on runs behind a copy."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def flush(self) -> None:
        """Let go of what was sent: what is launched from now on may have its memory."""
        self._release(0)

    def _release(self, count: int) -> None:
        """Leave at most ``count`` in flight. Memory is reused only behind the copy out of it."""
        while len(self._leaving) > count:
            value, done = self._leaving.popleft()
            self.wait(done)
            del value

    def _copy(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()


class Coming:
    """A tensor on its way to the device.

    Whoever it was for may be dropped meanwhile: symbols are chosen anew, a call raises, a
    generation ends. Its memory is reused only behind the copy into it.

    Args:
        lane: that brings it.
        host: what is copied.
    """

    def __init__(self, lane: Lane, host: Tensor) -> None:
        self._lane, self._taken = lane, False
        self.value, self._arrived = lane.bring(host)

    def take(self) -> Tensor:
        """What came, for whatever is launched from now on."""
        self._taken = True
        self._lane.wait(self._arrived)
        return self.value

    def __del__(self) -> None:
        if not self._taken and not sys.is_finalizing():
            self._lane.wait(self._arrived)


@dataclass(frozen=True)
class Storage:
    """How something is kept.

    Args:
        dtype: ``compute`` keeps the dtype, others as the recipe names them. ``float8`` has a scale
            for each row of the last dim.
        lane: copies to the host and back; ``None`` keeps everything on the device.
        backend: of the passes over what is kept; ``None`` takes the best that accepts.
    """

    dtype: str = "compute"
    lane: Lane | None = None
    backend: str | None = None

    def resolve(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of ``dtype`` is kept."""
        return DTYPES.get(self.dtype, dtype)

    def nbytes(self, shape: torch.Size, dtype: torch.dtype, wide: bool = False) -> int:
        """Bytes of a tensor as it is kept, the scales of fp8 included.

        Args:
            shape: of the tensor, like ``dtype``.
            wide: fp16 is kept as fp32 where nothing says otherwise (see :class:`History`).
        """
        kept = self.resolve(torch.float32 if wide and dtype == torch.float16 else dtype)
        scales = shape[:-1].numel() * torch.float32.itemsize if kept.itemsize == 1 else 0
        return shape.numel() * kept.itemsize + scales


class Kept:
    """One tensor between steps.

    Args:
        storage: how to keep it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._payload: Tensor | None = None
        self._scale: Tensor | None = None
        self._coming: Coming | None = None
        self._dtype = torch.float32

    def put(self, tensor: Tensor) -> None:
        """Keep ``tensor``, which nobody may write to afterwards."""
        lane = self._storage.lane
        self._dtype, self._coming = tensor.dtype, None
        packed, self._scale = _pack(tensor, self._storage.resolve(tensor.dtype))
        if lane is None:
            self._payload = packed
            return
        packed = packed.contiguous()
        if self._payload is None or self._payload.shape != packed.shape:
            self._payload = lane.room(packed)
        lane.send(packed, self._payload)

    def prefetch(self) -> None:
        """Start the way back from the host; :meth:`get` will be called soon."""
        lane = self._storage.lane
        if lane is not None and self._payload is not None and self._coming is None:
            self._coming = Coming(lane, self._payload)

    def get(self) -> Tensor:
        """The tensor on its device, in the dtype in which it came.

        Not to be written to, but for what came from the host: that is a copy, and the caller's.
        """
        assert self._payload is not None, "nothing was put"
        packed = self._payload
        if self._storage.lane is not None:
            self.prefetch()
            assert self._coming is not None
            packed, self._coming = self._coming.take(), None
        if self._scale is None:
            return packed.to(self._dtype)
        return packed.to(self._dtype) * self._scale.to(self._dtype)

    def tensors(self) -> list[Tensor]:
        """Everything that is held, for accounting."""
        held = [self._payload, self._scale, None if self._coming is None else self._coming.value]
        return [tensor for tensor in held if tensor is not None]


def _pack(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``(values, scale of each row)``; no scale where the dtype has range enough."""
    if dtype == torch.float16 and tensor.dtype != dtype:
        limit = torch.finfo(dtype).max  # the nearest value, not infinity, which would become NaN
        return tensor.clamp(-limit, limit).to(dtype), None
    if dtype != torch.float8_e4m3fn:
        return tensor.to(dtype), None
    largest = tensor.abs().amax(-1, keepdim=True).float()
    scale = (largest / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).to(dtype), scale
