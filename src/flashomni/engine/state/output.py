"""Caching the model's output: the widest span of all, from the first embedder to the last norm.

Far smaller than the histories of the streams (a velocity has 64 channels a token on FLUX, a stream
3,072), and it does not mind what happens between two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flashomni.engine.state.cache import History
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

    def record(self, output: Any, step: int) -> bool:
        """Keep what the model returned at ``step``; ``False`` if it cannot be kept.

        Args:
            output: a tensor, or a tuple, list or mapping (a diffusers output) of tensors and other
                values; the others are handed on as they were.
        """
        tensors: list[Tensor] = []
        shape = _take_apart(output, tensors)
        if not tensors:
            return False
        if shape != self._shape:
            keep = self._order + 1
            self._histories = [
                History(self._order, keep, self._storage, wide=True) for _ in tensors
            ]
        for history, tensor in zip(self._histories, tensors, strict=True):
            history.push(tensor, step)
        self._shape = shape
        return True

    @property
    def times(self) -> tuple[int, ...]:
        """The steps that are kept, newest last."""
        return self._histories[0].times if self._histories else ()

    def predict(self, coefficients: Tensor) -> Any:
        """The output forecast, in the structure in which it came."""
        return _put_together(self._shape, (h.predict(coefficients) for h in self._histories))

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        return [tensor for history in self._histories for tensor in history.tensors()]


_SLOT = object()  # stands where a tensor was


def _take_apart(output: Any, tensors: list[Tensor]) -> Any:
    """The structure of an output without its tensors, which are added to ``tensors``."""
    if isinstance(output, Tensor):
        tensors.append(output)
        return _SLOT
    if isinstance(output, dict):  # diffusers' outputs are ordered dicts
        return type(output), {key: _take_apart(part, tensors) for key, part in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output), [_take_apart(part, tensors) for part in output]
    return None, output


def _put_together(shape: Any, tensors: Iterator[Tensor]) -> Any:
    if shape is _SLOT:
        return next(tensors)
    kind, parts = shape
    if kind is None:
        return parts
    if isinstance(parts, dict):
        return kind(**{key: _put_together(part, tensors) for key, part in parts.items()})
    return kind(_put_together(part, tensors) for part in parts)
