"""Turns at a device: first come, first served, and whoever waits knows their place."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL = 0.2  # seconds after which a waiting run looks whether it was cancelled


class Cancelled(Exception):
    """Somebody asked for the run to end."""


class Turns:
    """A queue of runs, one of which is served."""

    def __init__(self) -> None:
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Runs that wait or are served."""
        return len(self._queue)

    @contextmanager
    def mine(self, stop: threading.Event, on_place: Callable[[int], None]) -> Iterator[None]:
        """Wait for the turn, and hold it.

        Args:
            stop: set to give up waiting.
            on_place: told how many are in front, whenever that changes; not told 0.

        Raises:
            Cancelled: ``stop`` was set before the turn came.
        """
        ticket, told = object(), 0
        with self._changed:
            self._queue.append(ticket)
        try:
            while True:
                with self._changed:
                    place = self._queue.index(ticket)
                    if place == told and place:
                        self._changed.wait(POLL)
                        place = self._queue.index(ticket)
                if stop.is_set():
                    raise Cancelled
                if place == 0:
                    break
                if place != told:
                    told = place
                    on_place(place)
            yield
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()
