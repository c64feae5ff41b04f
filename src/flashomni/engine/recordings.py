"""What CUDA graphs keep: recordings of calls, whose they are, and the bookkeeping behind each.

A *slot* has recordings of one sort of generation and branch. While a generation runs, the slot is
its own; generations in turn have a slot each, and the next one takes a slot that is free.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashomni.engine.capture import Replay
from flashomni.engine.state.mirror import mirror

# Of a branch: what no recording puts back.
LIVE = ("division", "memory", "slot", "at", "newest", "resets", "chosen")


@dataclass(eq=False)
class Entry:
    """Calls of one key.

    Attributes:
        uses: how often it was called without a graph.
        graph: of the call, once it was recorded.
        number: of the recording, in the order in which they were made.
        inputs: its arguments, which each replay fills.
        output: what it returned, filled by each replay.
        state: of the branch behind it; ``None`` where it changes nothing.
        layers: the records of the layers.
        numbers: the coefficients that it used, of each group of layers.
        levels: of the noise that they are for, where they depend on it.
        held: what else it reads (see :meth:`Call.given`).
        refused: why it cannot be recorded.
        keeps: bytes that the branch keeps behind it, where it changes that.
        flops: of its largest block.
        sent: what it counts of exchanges with other ranks (:attr:`Ranks.counts`).
        returns: whether it may run again behind recordings that were made later.
    """

    uses: int = 0
    graph: Replay | None = None
    number: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    output: Any = None
    state: dict[str, Any] | None = None
    layers: list[Any] = field(default_factory=list)
    numbers: list[dict] = field(default_factory=list)
    levels: tuple[float, ...] = ()
    held: list[Any] = field(default_factory=list)
    refused: str = ""
    keeps: int = 0
    flops: int = 0
    sent: tuple[int, ...] = ()
    returns: bool = False


class Slot:
    """Recordings of one branch of one generation at a time.

    Args:
        key: the sort of its calls.
        make_pool: makes the memory of those that return, and that of all others.
    """

    def __init__(self, key: Hashable, make_pool: Callable[[], Any]) -> None:
        self.key, self._make_pool = key, make_pool
        self.entries: dict[Hashable, Entry] = {}
        self._pools: dict[bool, Any] = {}
        self._owner: Any = lambda: None

    @property
    def free(self) -> bool:
        owner = self._owner()
        return owner is None or owner.slot is not self

    def give(self, branch: Any) -> None:
        self._owner, branch.slot = weakref.ref(branch), self

    def pool_of(self, entry: Entry) -> Any:
        """Memory to record it in; torch gives up a pool with the last recording in it."""
        if not any(x.graph for x in self.entries.values() if x.returns == entry.returns):
            self._pools[entry.returns] = self._make_pool()
        return self._pools[entry.returns]

    @property
    def nbytes(self) -> int:
        return sum(entry.graph.nbytes for entry in self.entries.values() if entry.graph)

    @property
    def expected(self) -> int:
        """Bytes that its recordings hold, or will hold at least."""
        return max(self.nbytes, sum(entry.keeps for entry in self.entries.values()))

    @property
    def count(self) -> int:
        return sum(entry.graph is not None for entry in self.entries.values())


def drop(slots: list[Slot]) -> None:
    """Forget recordings, whoever still knows their calls."""
    for slot in slots:
        for entry in slot.entries.values():
            entry.graph = None
        slot.entries.clear()
    slots.clear()


def state_of(branch: Any) -> dict[str, Any]:
    """The bookkeeping of a branch that a call changes."""
    return {key: value for key, value in vars(branch).items() if key not in LIVE}


def put_back(branch: Any, state: dict[str, Any], measured: bool = False) -> None:
    """The bookkeeping of a branch as it was; which steps were computed is another matter.

    Args:
        branch: gets it.
        state: as :func:`state_of` gave it.
        measured: whether fractions of the recorded call were measured anew just now. All others
            stay what they are: numbers that are on the host are no part of a recording.
    """
    computed = [group.computed for group in branch.groups]
    fractions = [cache.fraction for cache in branch.layers]
    vars(branch).update(mirror(state))
    for cache, fraction in zip(branch.layers, fractions, strict=True):
        if not measured or cache.fraction is None or cache.fraction.sent:
            cache.fraction = fraction
    for group, steps in zip(branch.groups, computed, strict=True):
        group.computed = steps
