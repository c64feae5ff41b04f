"""Caching the model's output: the widest span of all, from the first embedder to the last norm.

Far smaller than the histories of the streams (a velocity has 64 channels a token on FLUX, a stream
3,072), and it does not mind what happens between two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flashomni.engine.state.cache import History
from flashomni.engine.state.span import Measure
from flashomni.engine.state.storage import Storage


class Output:
    """What a model returned at its computed steps.

    Args:
        order: forecast order.
        storage: how to keep it.
    """

    def __init__(self, order: int, storage: Storage) -> None:
        self._order, self._storage = order, storage
        self._histories: list[History] = []
        self._shape: Any = None
        self.misses: list[tuple[Tensor, Tensor]] = []

    def record(self, output: Any, step: int, measure: Measure | None = None) -> bool:
        """Keep what the model returned at ``step``; ``False`` if it cannot be kept.

        Args:
            output: a tensor, or a tuple, list or mapping (a diffusers output) of tensors and other
                values; the others are handed on as they were.
            measure: compares the forecast with it, as :class:`Spans` do.
        """
        tensors: list[Tensor] = []
        shape = take_apart(output, tensors)
        if not tensors:
            return False
        if shape != self._shape:
            keep = self._order + 1
            self._histories = [
                History(self._order, keep, self._storage, wide=True) for _ in tensors
            ]
        for history, tensor in zip(self._histories, tensors, strict=True):
            if measure is not None and history.times:
                self.misses.append(history.miss(measure(history.times), tensor))
            history.push(tensor, step)
        self._shape = shape
        return True

    @property
    def times(self) -> tuple[int, ...]:
        """The steps that are kept, newest last."""
        return self._histories[0].times if self._histories else ()

    def predict(self, coefficients: Tensor) -> Any:
        """The output forecast, in the structure in which it came."""
        return put_together(self._shape, (h.predict(coefficients) for h in self._histories))

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        return [tensor for history in self._histories for tensor in history.tensors()]


_SLOT = object()  # stands where a tensor was


def take_apart(output: Any, tensors: list[Tensor]) -> Any:
    """The structure of an output without its tensors, which are added to ``tensors``."""
    if isinstance(output, Tensor):
        tensors.append(output)
        return _SLOT
    if isinstance(output, dict):  # diffusers' outputs are ordered dicts
        return type(output), {key: take_apart(part, tensors) for key, part in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output), [take_apart(part, tensors) for part in output]
    return None, output


def put_together(shape: Any, tensors: Iterator[Tensor]) -> Any:
    """What :func:`take_apart` took apart, with other tensors."""
    if shape is _SLOT:
        return next(tensors)
    kind, parts = shape
    if kind is None:
        return parts
    if isinstance(parts, dict):
        return kind(**{key: put_together(part, tensors) for key, part in parts.items()})
    return kind(put_together(part, tensors) for part in parts)
