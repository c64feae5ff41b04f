"""One call of a model at a time: its hooks, its caches and its place in the schedule are shared."""

from __future__ import annotations

import threading


class OneCall:
    """Whose call of a model is under way.

    Args:
        name: how messages call the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._owner: int | None = None
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
