"""The ranks that share a sequence, and the collectives between them, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Messages = Mapping[int, Sequence[Tensor]]  # by the rank at the other end


class Ranks:
    """A group of torch.distributed.

    Args:
        group: whose ranks share a sequence, in the order of their parts.

    Attributes:
        rank: the own place in it.
        size: how many there are.
        exchanges: all-to-alls since the last :meth:`restart`.
        nbytes: what this rank sent to others in them, or broadcast.
        gathers: all-gathers since then.
        broadcasts: of outputs since then.
        device: where tensors have to be, for what they have to tell each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.restart()
        is_nccl = self._has_lists = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"

    def restart(self) -> None:
        """Count from 0."""
        self.counts = (0, 0, 0, 0)

    @property
    def counts(self) -> tuple[int, ...]:
        """``exchanges``, ``nbytes``, ``gathers`` and ``broadcasts``, to be set all at once too."""
        return self.exchanges, self.nbytes, self.gathers, self.broadcasts

    @counts.setter
    def counts(self, counts: tuple[int, ...]) -> None:
        self.exchanges, self.nbytes, self.gathers, self.broadcasts = counts

    def exchange(self, sends: Messages, takes: Messages) -> Callable[[], None]:
        """Start an all-to-all of tensors where they lie: none is packed, and the own part stays.

        Args:
            sends: for each other rank as many tensors, contiguous, and not to be changed before the
                end; it takes them in this order.
            takes: from each other rank, what is written to.

        Returns:
            What waits for it. On a GPU the device waits, not the process.
        """
        self.exchanges += 1
        held = [x for each in sends.values() for x in each]  # they are read until the end
        self.nbytes += sum(x.numel() * x.element_size() for x in held)
        works = self._in_rounds(sends, takes) if self._has_lists else self._one_by_one(sends, takes)

        def wait() -> None:
            for work in works:
                work.wait()
            held.clear()

        return wait

    def _in_rounds(self, sends: Messages, takes: Messages) -> list[dist.Work]:
        """A message of each rank in one call: each takes the host as long as many would."""
        none = next(iter(sends.values()))[0].new_empty(0)
        others = range(self.size)
        return [
            dist.all_to_all(
                [takes[rank][number] if rank in takes else none for rank in others],
                [sends[rank][number] if rank in sends else none for rank in others],
                group=self.group,
                async_op=True,
            )
            for number in range(len(next(iter(sends.values()))))
        ]

    def _one_by_one(self, sends: Messages, takes: Messages) -> list[dist.Work]:
        """For gloo, whose lists must have tensors of one size."""
        places = dist.get_process_group_ranks(self.group)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(act, x, places[rank], self.group)
                for act, messages in ((dist.isend, sends), (dist.irecv, takes))
                for rank, each in messages.items()
                for x in each
            ]
        )

    def gather(self, x: Tensor) -> list[Tensor]:
        """``x`` of every rank: the same bits on all of them."""
        self.gathers += 1
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return parts

    def broadcast(self, x: Tensor, rank: int) -> None:
        """``x`` of one rank, into that of all others.

        Args:
            x: contiguous, of one shape on all ranks.
            rank: whose.
        """
        self.nbytes += x.numel() * x.element_size() * (rank == self.rank)
        self.broadcasts += 1
        dist.broadcast(x, dist.get_global_rank(self.group, rank), group=self.group)

    def gather_rows(self, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Rows of every rank, which may have different numbers of them.

        Args:
            x: ``[B, counts[rank], ...]``.
            counts: rows of each rank.
        """
        short = max(counts) - x.shape[1]
        if short:
            x = torch.cat([x, x.new_zeros(x.shape[0], short, *x.shape[2:])], 1)
        return [part[:, :count] for part, count in zip(self.gather(x), counts, strict=True)]

    def notes(self) -> list[str]:
        """For the report."""
        calls = f"{self.exchanges} all-to-alls"
        if self.broadcasts:
            calls = f"{self.broadcasts} broadcasts of outputs"
        return [
            f"rank {self.rank} of {self.size}, whose share these figures are: it sent "
            f"{self.nbytes:,} bytes in {calls}"
        ]


class Agreement:
    """Whether all ranks were given the same tensors; on the device until somebody asks.

    Args:
        ranks: who.
        tensors: by name, of the same shape on all ranks.
    """

    def __init__(self, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
        self._names = tuple(tensors)
        sums = torch.stack([checksum(x) for x in tensors.values()])
        self._sums = torch.stack(ranks.gather(sums))

    def check(self) -> None:
        """Waits for the device.

        Raises:
            ValueError: a tensor is another on another rank. All ranks raise alike.
        """
        wrong = (self._sums != self._sums[0]).any(0).tolist()
        names = [name for name, is_wrong in zip(self._names, wrong, strict=True) if is_wrong]
        if names:
            raise ValueError(
                f"{' and '.join(names)} must be the same on all ranks of a context parallel group, "
                "but ranks were given different values, and the picture would be none: pass "
                "generator=torch.Generator('cpu').manual_seed(n) with one n on every rank, and the "
                "same prompt"
            )


def checksum(x: Tensor) -> Tensor:
    """A sum of the bits, exact in any order: int64 scalar on the device."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(kinds[x.element_size()]).sum(dtype=torch.int64)
