"""Processes that train one model: started by torchrun, or one alone, which needs nothing of it.

Gradients are averaged in one call, over NCCL where there are cards, else gloo. What must be the
same everywhere (which clips come next, when to stop) is rank 0's decision, sent over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(seconds=180)  # compilation may take one rank longer than another


class Ranks:
    """This process among those that train together.

    Args:
        device: "cuda" or "cpu"; each rank takes a card of its own.

    Attributes:
        rank, size: number of this process, and how many there are.
        device: "cuda:N" or "cpu".
    """

    def __init__(self, device: str):
        self.rank, self.size = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.device = device
        if device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self.device)
        self.nccl = device == "cuda" and dist.is_nccl_available()
        self.control = None
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.nccl else "gloo", timeout=PATIENCE)
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, values: Iterable[float]) -> list[float]:
        """Rank 0's ``values``."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.broadcast(tensor, 0, group=self.control)
        return tensor.tolist()

    @torch.no_grad()
    def mean_(self, tensors: list[Tensor]) -> None:
        """Average ``tensors`` over the ranks, in place."""

        def average(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat.div_(self.size)

        self._together(tensors, average)

    @torch.no_grad()
    def copy_(self, tensors: list[Tensor]) -> None:
        """Give all ranks rank 0's ``tensors``, in place."""
        self._together(tensors, lambda flat: dist.broadcast(flat, 0))

    def _together(self, tensors: list[Tensor], exchange: Callable[[Tensor], object]) -> None:
        """One exchange of all of them, where there are several ranks."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        carried = flat if self.nccl else flat.cpu()
        exchange(carried)
        parts = carried.to(flat.device).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def close(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)
            dist.destroy_process_group()
