"""What the runtime asks of whoever learns a model by watching it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol


class Learner(Protocol):
    """Learns of a model what no adapter says, by watching the first calls of it."""

    def begin(self, args: tuple, kwargs: dict) -> tuple[Hashable, bool]:
        """A call of the model starts.

        Returns:
            What sort of call it is, and whether it is one to learn from: such a call computes
            everything, and nothing of it is kept.
        """

    def forget(self) -> None:
        """What was learned does not hold for another recipe."""

    def notes(self) -> list[str]:
        """What the report should say."""
