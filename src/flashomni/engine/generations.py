"""The generations in flight on one model: whose they are, and which are forgotten."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from flashomni.engine.clock import Position
from flashomni.engine.groups import Division
from flashomni.engine.state.generation import Generation

MAX_GENERATIONS = 8  # that have begun and not ended


class Generations:
    """One of each owner; those that have ended stay until another begins."""

    def __init__(self) -> None:
        self._of: dict[Hashable, Generation] = {}
        self._begun = 0

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._of.values())

    def at(self, position: Position) -> Generation | None:
        """The generation that a call at ``position`` goes on with; ``None`` if it begins one."""
        generation = self._of.get(position.key)
        return generation if generation is not None and generation.continues(position) else None

    def add(self, generation: Generation) -> bool:
        """Remember a new one, give it its number, and forget those that have ended.

        Returns:
            Whether one that has not ended had to go, the oldest.
        """
        alive = {
            key: old
            for key, old in self._of.items()
            if key != generation.key and not old.finished and getattr(key, "alive", True)
        }
        too_many = len(alive) >= MAX_GENERATIONS
        while len(alive) >= MAX_GENERATIONS:
            del alive[next(iter(alive))]
        for gone in self._of.keys() - alive.keys():
            self._of[gone].leave()
        self._of = {**alive, generation.key: generation}
        self._begun += 1
        generation.number = self._begun
        return too_many

    def done(self, pipe: Any) -> None:
        """Free and forget those of ``pipe``, and all that have ended.

        Args:
            pipe: a pipeline, or ``None`` where it is not known.
        """
        for key, generation in list(self._of.items()):
            is_its = pipe is not None and getattr(key, "belongs_to", lambda _: False)(pipe)
            if is_its or generation.finished:
                generation.free()
                del self._of[key]

    def arrange(self, division: Division) -> None:
        """Their model has other layers than was thought: nothing is kept of them yet."""
        for generation in self:
            generation.arrange(division)

    def clear(self, running: Generation | None = None) -> None:
        """Free and forget all; what they computed, and how many there were, stays known.

        Args:
            running: one that a call is under way in, maybe another thread's: it goes with that.
        """
        for generation in self:
            if generation is not running:
                generation.free()
        self._of.clear()

    def restart(self, running: Generation | None = None) -> None:
        """Free and forget all, and count from 1 again; see :meth:`clear`."""
        self.clear(running)
        self._begun = 0
