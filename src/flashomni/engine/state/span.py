"""Runs of layers that are cached whole: what a run adds to its streams is forecast, not computed.

Layers that S_q caches whole often lie side by side. The model does nothing between two of them but
hand on the streams, so the sum of what a run of them adds is all that the next computed layer can
see: one forecast for each stream replaces the run, whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage

Streams = tuple[Tensor, ...]
Measure = Callable[[tuple[int, ...]], Tensor]


@dataclass
class Span:
    """Layers ``start .. stop - 1``, cached whole.

    Attributes:
        before: streams at the entrance, while the step runs in which they are recorded.
        after: streams at the exit, likewise.
        versions: how often ``before`` and ``after`` had been written to when the block returned.
        histories: of what the run adds, for each stream.
    """

    start: int
    stop: int
    before: Streams
    after: Streams
    versions: tuple[int, ...]
    histories: list[History] = field(default_factory=list)


class Spans:
    """The spans of one branch: recorded in an Update step, replayed in Dispatch steps.

    A span ends where a layer is computed, where the model itself changes a stream between two
    blocks (a ControlNet's residual, added in place or not), where something but the next block
    reads what a block returns, and where a span of the interval before ended: differences need the
    same quantity twice.

    What a run adds is taken when it ends. A model that writes into a block's output before that
    shows by the tensors' versions: then nothing of the step is kept, and from the next one on that
    block's addition is taken as soon as it returns. Tensors made under inference mode have no
    versions: there the model goes on with copies that have.

    Args:
        order: forecast order.
        storage: how to keep the histories.

    Attributes:
        measure: gives the coefficients of a forecast at this step; with it, forecasts are compared
            with what is recorded.
        misses: what the comparisons gave, see :meth:`History.miss`.
    """

    def __init__(self, order: int, storage: Storage) -> None:
        self._order, self._storage = order, storage
        self._current: list[Span] = []
        self._new: list[Span] = []
        self._open: Span | None = None
        self._exposed: set[int] = set()  # layers whose output the model writes to
        self._whole = True
        self.measure: Measure | None = None
        self.misses: list[tuple[Tensor, Tensor]] = []

    def times(self, index: int) -> tuple[int, ...]:
        """The anchors of the span that layer ``index`` is in; none if it is not cached whole."""
        span = self._at(index)
        return () if span is None else span.histories[0].times

    def replay(self, index: int, streams: Streams, coefficients: Tensor) -> Streams | None:
        """The streams behind layer ``index``; ``None`` if it is not cached whole."""
        span = self._at(index)
        if span is None:
            return None
        if index > span.start:  # its first layer stood in for the whole span
            return streams
        pairs = zip(span.histories, streams, strict=True)
        return tuple(history.predict(coefficients, stream) for history, stream in pairs)

    def record(
        self, index: int, before: Streams, after: Streams, step: int, chain: bool = True
    ) -> Streams:
        """Layer ``index`` is cached whole from now on and led from ``before`` to ``after``.

        Args:
            chain: whether the next layer may join its span. If not, what it adds is taken at once,
                before anybody can write to ``after``.

        Returns:
            ``after``, or copies of it: what the model must go on with.
        """
        span, chain = self._open, chain and index not in self._exposed
        if chain:
            after = _versioned(after)
        if span is not None and chain and self._continues(span, index, before):
            span.stop, span.after = index + 1, after
            span.versions = _versions(span.before, after)
            return after
        self.close(step)
        before = _versioned(before) if chain else before
        self._open = Span(index, index + 1, before, after, _versions(before, after))
        if not chain:
            self.close(step)
        return after

    def _continues(self, span: Span, index: int, before: Streams) -> bool:
        untouched = all(a is b for a, b in zip(span.after, before, strict=True))
        untouched = untouched and span.versions == _versions(span.before, span.after)
        return span.stop == index and untouched and self._at(index) is self._at(index - 1)

    def close(self, step: int) -> None:
        """The open span, if any, ended with the layer that was recorded last."""
        span, self._open = self._open, None
        if span is None:
            return
        if span.versions != _versions(span.before, span.after):
            self._exposed.update((span.start - 1, span.stop - 1))
            self._whole = False
            return
        old = self._at(span.start)
        if old is not None and (old.start, old.stop) == (span.start, span.stop):
            span.histories = old.histories
        else:
            keep = self._order + 1
            span.histories = [
                History(self._order, keep, self._storage, wide=True) for _ in span.before
            ]
        for history, before, after in zip(span.histories, span.before, span.after, strict=True):
            if self.measure is not None and history.times:
                self.misses.append(history.miss(self.measure(history.times), after, before))
            history.push(after, step, minus=before)
        span.before = span.after = ()
        self._new.append(span)

    def finish(self, step: int) -> bool:
        """The step that recorded is over: its spans are the current ones.

        Returns:
            Whether all of them could be kept.
        """
        self.close(step)
        whole, self._whole = self._whole, True
        self._current, self._new = self._new if whole else [], []
        return whole

    def clear(self) -> None:
        self._current, self._new, self._open = [], [], None

    def _at(self, index: int) -> Span | None:
        return next((span for span in self._current if span.start <= index < span.stop), None)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        spans = self._current + self._new
        return [t for span in spans for history in span.histories for t in history.tensors()]


def _versions(before: Streams, after: Streams) -> tuple[int, ...]:
    """How often each tensor was written to; inference tensors count nothing and give -1."""
    return tuple(-1 if x.is_inference() else x._version for x in (*before, *after))


def _versioned(streams: Streams) -> Streams:
    """The streams, inference tensors as copies that count what is written to them."""
    if not any(stream.is_inference() for stream in streams):
        return streams
    with torch.inference_mode(False), torch.no_grad():
        return tuple(x.clone() if x.is_inference() else x for x in streams)
