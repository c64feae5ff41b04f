"""One call of a model at a time: its hooks, its caches and its place in the schedule are shared."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator


class OneCall:
    """Whose call of a model is under way.

    Args:
        name: how messages call the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._owner: int | None = None
        self._is_inside = False
        self._guard = threading.Lock()

    @property
    def mine(self) -> bool:
        """Whether it is this thread's."""
        return self._owner == threading.get_ident()

    def enter(self) -> None:
        """A call begins.

        Raises:
            RuntimeError: another one is under way.
        """
        with self._guard:
            if self._owner is not None:
                raise RuntimeError(
                    f"two calls of one accelerated {self._name} overlap: one is under way while "
                    "another thread (or the model itself) starts the next. Let them take turns "
                    "with a lock around each call, or give each its own transformer"
                )
            self._owner = threading.get_ident()

    def leave(self) -> None:
        """It is over."""
        self._owner = None

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The model runs."""
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def take_over(self) -> bool:
        """Whether a call was left in which nobody is any more; it is this thread's then.

        An interrupt (Ctrl-C) may come before the model runs or behind it, and torch calls no hook
        for it.
        """
        with self._guard:
            is_left = not self._is_inside if self.mine else self._owner not in _threads()
            if self._owner is None or not is_left:
                return False
            self._owner, self._is_inside = threading.get_ident(), False
            return True


def _threads() -> set[int]:
    """Those that are alive, also ones that Python has not started."""
    return set(sys._current_frames())
