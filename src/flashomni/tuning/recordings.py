"""The dense runs of all tuning prompts: from memory as far as they may, from disk, or run now."""

from __future__ import annotations

import time
from collections.abc import Callable

from flashomni.tuning.record import Recording
from flashomni.tuning.state import State


class Recordings:
    """Gives the dense run of a prompt by its number.

    Args:
        run: makes one; gives it and the seconds that looking at it took, which do not count.
        state: where they are kept.
        nbytes: of one.
        room: bytes that all may take in host memory.
    """

    def __init__(
        self,
        run: Callable[[int], tuple[Recording, float]],
        state: State,
        nbytes: int,
        room: int,
    ) -> None:
        self._run, self._state, self._nbytes, self._room = run, state, nbytes, room
        self._kept: dict[int, Recording] = {}

    def __call__(self, number: int) -> Recording:
        found = self._kept.get(number)
        if found is None:
            found = self._state.recording(number)
        if found is None:
            start = time.perf_counter()
            found, spent = self._run(number)
            self._state.keep(number, found, time.perf_counter() - start - spent)
        while self._kept and (len(self._kept) + 1) * self._nbytes > self._room:
            del self._kept[next(iter(self._kept))]
        self._kept[number] = found
        return found
