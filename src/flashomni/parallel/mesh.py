"""Which ranks do what: a (cfg, ulysses) mesh of all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from flashomni.parallel.ranks import Ranks


@dataclass(frozen=True)
class Mesh:
    """The place of this rank; ``None`` where there is but one.

    Args:
        ulysses: those that share a sequence with it.
        cfg: those that run the other conditioning branches of what it runs.
    """

    ulysses: Ranks | None = None
    cfg: Ranks | None = None

    @classmethod
    def of(cls, ulysses: int, cfg: int) -> Mesh:
        """Of all ranks, ``ulysses`` neighbours together. All ranks have to call it.

        Args:
            ulysses: ranks that share a sequence.
            cfg: conditioning branches that run at once.

        Raises:
            ValueError: a number is none, or they are not all ranks.
            RuntimeError: torch.distributed was not initialised.
        """
        for name, number in (("ulysses", ulysses), ("cfg", cfg)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be a number of ranks from 1 on, got {number!r}")
        if ulysses * cfg == 1:
            return cls()
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"ulysses={ulysses}, cfg={cfg} need torch.distributed: start the program with "
                f"torchrun --nproc-per-node {ulysses * cfg}, and call "
                "torch.distributed.init_process_group() first"
            )
        size, rank = dist.get_world_size(), dist.get_rank()
        if ulysses * cfg != size:
            raise ValueError(
                f"ulysses times cfg must be the number of ranks, got ulysses={ulysses} and "
                f"cfg={cfg} on {size}"
            )
        rows = [list(range(c * ulysses, (c + 1) * ulysses)) for c in range(cfg)]
        columns = [list(range(u, size, ulysses)) for u in range(ulysses)]
        return cls(_own(rows, rank), _own(columns, rank))


def _own(groups: list[list[int]], rank: int) -> Ranks | None:
    """The group with this rank; ``None`` where it is alone."""
    if len(groups[0]) == 1:
        return None
    world = dist.group.WORLD
    if len(groups) == 1 and world is not None:
        return Ranks(world)
    made = [dist.new_group(members) for members in groups]
    return Ranks(next(g for g, members in zip(made, groups, strict=True) if rank in members))
