"""Where the vision tokens of a call lie in time and space, as far as a model tells."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashomni.policies import Policy

log = logging.getLogger("flashomni")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """The vision stream: generated tokens in raster order, then those of reference images.

    Args:
        shape: ``(T, H, W)`` of the generated tokens; ``None`` where the model does not tell.
        references: tokens of reference images behind them.
        why: where there is no shape, what is missing, by the name of the model's argument.
    """

    shape: Shape | None = None
    references: int = 0
    why: str = "the model's adapter does not tell where its tokens lie"

    @classmethod
    def of_images(cls, images: Sequence[Shape]) -> Geometry:
        """The first is generated, the others are references."""
        first, *others = images
        return cls(first, sum(math.prod(other) for other in others))

    def place(self, start: int, count: int) -> dict[str, Any]:
        """What :meth:`LayerRun.begin` takes for a vision stream: ``shape`` and ``spans``.

        Nothing where the stream has other tokens than those that are known.

        Args:
            start: its first token in the sequence.
            count: its tokens.
        """
        if self.shape is None or math.prod(self.shape) + self.references != count:
            return {}
        end = start + count
        spans = (("reference", end - self.references, end),) if self.references else ()
        return {"shape": self.shape, "spans": spans}


class Asked:
    """Asks an adapter for the geometry at a generation's start, where the policy looks at it.

    Args:
        model: whose arguments the adapter reads.
        policy: only one that wants a shape has the arguments read, which may synchronise once.
        tell: of the adapter: the arguments of a call by name -> :class:`Geometry`.
    """

    def __init__(
        self, model: Any, policy: Policy, tell: Callable[[Mapping[str, Any]], Geometry]
    ) -> None:
        self._model, self._policy, self._tell = model, policy, tell
        self._said = False

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> Geometry | None:
        """The geometry; ``None`` where nobody wants it. Logs once where there is no shape."""
        if not self._policy.wants_shape():
            return None
        names = list(inspect.signature(type(self._model).forward).parameters)[1:]
        found = self._tell({**dict(zip(names, args, strict=False)), **kwargs})
        if found.shape is None and not self._said:
            self._said = True
            log.warning(
                "policy %s goes without frames, rows and columns of %s: %s",
                self._policy.name,
                type(self._model).__name__,
                found.why,
            )
        return found
