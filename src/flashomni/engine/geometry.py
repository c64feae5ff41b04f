"""Where the vision tokens of a call lie in time and space, as far as a model tells."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashomni.engine.arguments import by_name
from flashomni.engine.token_order import TokenOrder
from flashomni.policies import Policy
from flashomni.symbols.order import Shape

log = logging.getLogger("flashomni")


@dataclass(frozen=True)
class Geometry:
    """The vision stream: generated tokens, then those of reference images.

    A model has both in raster order.

    Args:
        shape: ``(T, H, W)`` of the generated tokens; ``None`` where the model does not tell.
        references: tokens of reference images behind them.
        why: where there is no shape, what is missing, by the name of the model's argument.
        pictures: shapes of the reference images, where the model tells.
        tokens: the order in which blocks get them, where that is another.
    """

    shape: Shape | None = None
    references: int = 0
    why: str = "the model's adapter does not tell where its tokens lie"
    pictures: tuple[Shape, ...] = ()
    tokens: TokenOrder | None = None

    @classmethod
    def of_images(cls, images: Sequence[Shape]) -> Geometry:
        """The first is generated, the others are references."""
        first, *others = images
        count = sum(math.prod(other) for other in others)
        return cls(first, count, pictures=tuple(others))

    def in_order(self, order: str, device: torch.device) -> Geometry:
        """The same tokens in another order, those of each picture among themselves.

        Reference tokens whose pictures are unknown stay as they are.
        """
        assert self.shape is not None
        known = sum(math.prod(picture) for picture in self.pictures) == self.references
        pictures = self.pictures if known else ()
        tokens = TokenOrder(order, (self.shape, *pictures), self.references, device)
        return replace(self, tokens=tokens)

    def place(self, start: int, count: int) -> dict[str, Any]:
        """What :meth:`LayerRun.begin` takes for a vision stream: ``shape``, ``spans``, ``order``.

        Nothing where the stream has other tokens than those that are known.

        Args:
            start: its first token in the sequence.
            count: its tokens.
        """
        if self.shape is None or math.prod(self.shape) + self.references != count:
            return {}
        end = start + count
        spans = (("reference", end - self.references, end),) if self.references else ()
        order = "raster" if self.tokens is None else self.tokens.order
        return {"shape": self.shape, "spans": spans, "order": order}


class Asked:
    """Asks an adapter for the geometry at a generation's start, where somebody looks at it.

    Args:
        model: whose arguments the adapter reads.
        policy: only for one that wants a shape, or another order than ``raster``, are the arguments
            read, which may synchronise once.
        tell: of the adapter: the arguments of a call by name -> :class:`Geometry`.
        order: of the tokens in the blocks.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        tell: Callable[[Mapping[str, Any]], Geometry],
        order: str = "raster",
    ) -> None:
        self._model, self._policy, self._tell, self._order = model, policy, tell, order
        self._said = False

    def __call__(
        self, device: torch.device, args: tuple, kwargs: Mapping[str, Any]
    ) -> Geometry | None:
        """The geometry; ``None`` where nobody wants it. Logs once where there is no shape.

        Raises:
            NotImplementedError: tokens are to be reordered, and nobody knows where they lie.
        """
        reorders = self._order != "raster"
        if not reorders and not self._policy.wants_shape():
            return None
        found = self._tell(by_name(self._model, args, kwargs))
        if reorders and found.shape is None:
            raise NotImplementedError(
                f"token_order {self._order!r} needs frames, rows and columns of "
                f"{type(self._model).__name__}: {found.why}; take token_order 'raster'"
            )
        if reorders:
            return found.in_order(self._order, device)
        if found.shape is None and not self._said:
            self._said = True
            log.warning(
                "policy %s goes without frames, rows and columns of %s: %s",
                self._policy.name,
                type(self._model).__name__,
                found.why,
            )
        return found
