"""What runs of layers add to the token streams: seen, and held, through torch's own hooks.

The adapter of a model says which arguments of a block are its streams and what it returns. A hook
in front of the first block of a run and one behind its last see the streams of both; what is
between is what the run adds, which a recipe with groups of layers forecasts.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.lab.fidelity.compare import processor_time
from flashomni.models import Site
from flashomni.tuning.drive import Compute

Range = tuple[int, int]
# Given the number of a piece and the streams behind it; other streams, or None.
Behind = Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...] | None]


def partition(names: Sequence[str], count: int) -> tuple[Range, ...]:
    """Divide layers into runs: kinds of layers as far as there are, then halves of the longest.

    Args:
        names: of all layers in order; those of one list of the model (``single_transformer_blocks``
            ``.0``) are of one kind.
        count: of runs to make; fewer where there are fewer layers, or none to divide.

    Returns:
        ``(start, stop)`` of each.
    """
    runs = list[Range]()
    for _, members in groupby(names, key=lambda name: name.rpartition(".")[0]):
        start = runs[-1][1] if runs else 0
        runs.append((start, start + len(list(members))))
    while len(runs) > max(count, 1):
        lengths = [runs[i + 1][1] - runs[i][0] for i in range(len(runs) - 1)]
        place = lengths.index(min(lengths))
        runs[place : place + 2] = [(runs[place][0], runs[place + 1][1])]
    while len(runs) < count and any(stop - start > 1 for start, stop in runs):
        start, stop = max(runs, key=lambda run: run[1] - run[0])
        middle = (start + stop) // 2
        place = runs.index((start, stop))
        runs[place : place + 1] = [(start, middle), (middle, stop)]
    return tuple(runs)


@dataclass
class _Piece:
    """Layers of one kind in one part: their streams are the same behind each of them."""

    part: int
    start: int
    stop: int


class Watch:
    """Sees what parts of a model's layers add while it computes; a context manager.

    Nothing stands in for a forward: hooks of torch lie on the first and last blocks as long as the
    context is open.

    Args:
        sites: of the adapter, in order.
        parts: ``(start, stop)`` of each.
        device: where the model computes.
        numbers: to keep of what a part adds in a step; where it is more, as many are drawn, always
            the same, and scaled so that inner products are right in the mean.
        calls: of the model in a step.

    Attributes:
        added: by part, by step: the numbers, of all calls and streams of the step, on the host.
        seconds: of each part so far; ``whole`` of the calls that they are parts of.
        spent: seconds that watching took.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        parts: Sequence[Range],
        device: torch.device,
        numbers: int,
        calls: int = 1,
    ) -> None:
        self._sites, self._device, self._numbers = sites, device, numbers // calls
        self._pieces = _pieces([site.name for site in sites], parts)
        self.added: list[dict[int, list[Tensor]]] = [{} for _ in parts]
        self._times: list[list[tuple[Any, Any]]] = [[] for _ in parts]
        self._calls: list[tuple[Any, Any]] = []
        self.spent = 0.0
        # Of a CPU that others use as well, a wait for a core is no cost.
        self._clock = time.perf_counter if device.type == "cuda" else processor_time
        self._handles: list[Any] = []
        self._before: tuple[Tensor, ...] = ()
        self._entered: Any = None
        self._drawn: dict[Range, Tensor] = {}
        self._held: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by piece and call
        self._behind: Behind | None = None  # nobody looks

    def __enter__(self) -> Watch:
        for number, piece in enumerate(self._pieces):
            self._hook(number, piece)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, number: int, piece: _Piece) -> None:
        first, last = self._sites[piece.start], self._sites[piece.stop - 1]
        names = list(inspect.signature(first.run).parameters)[2:]  # behind run and block

        def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._behind is None:
                return
            started = self._clock()
            self._before = tuple(
                (kwargs[name] if name in kwargs else args[names.index(name)]).clone()
                for name in first.streams
            )  # a model may write to them
            self.spent += self._clock() - started
            self._entered = self._now()

        def leave(block: nn.Module, args: tuple, output: Any) -> Any:
            if self._behind is None:
                return None
            self._times[piece.part].append((self._entered, self._now()))
            started = self._clock()
            streams = self._behind(number, last.unpack(output))
            self.spent += self._clock() - started
            return None if streams is None else last.pack(streams)

        self._handles += [
            first.block.register_forward_pre_hook(enter, with_kwargs=True),
            last.block.register_forward_hook(leave),
        ]

    def see(self, step: int, call: int, compute: Compute) -> Tensor:
        """Compute a call of the model, and keep what the parts add."""

        def keep(number: int, after: tuple[Tensor, ...]) -> None:
            found = self.added[self._pieces[number].part].setdefault(step, [])
            pieces = sum(self._pieces[number].part == piece.part for piece in self._pieces)
            each = max(self._numbers // (pieces * len(after)), 1)
            for old, new in zip(self._before, after, strict=True):
                found.append(self._drawn_of(new.float() - old.float(), each))

        value = self._computed(compute, keep)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # to wait for the model is no part of watching
        started = self._clock()
        for added in self.added:
            added[step] = [each.cpu() for each in added[step]]
        self.spent += self._clock() - started
        return value

    def hold(self, call: int, compute: Compute) -> Tensor:
        """Compute a call, and remember all that the parts add in it, on the device."""

        def keep(number: int, after: tuple[Tensor, ...]) -> None:
            both = zip(self._before, after, strict=True)
            self._held[number, call] = tuple(new.float() - old.float() for old, new in both)

        return self._computed(compute, keep)

    def reuse(self, part: int, call: int, compute: Compute) -> Tensor:
        """Compute a call in which one part adds what it added when it was held last."""

        def replace(number: int, after: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._pieces[number].part != part:
                return None
            both = zip(self._before, self._held[number, call], strict=True)
            return tuple((old.float() + added).to(old.dtype) for old, added in both)

        return self._computed(compute, replace)

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each part, in all calls so far."""
        return tuple(sum(self._between(*pair) for pair in pairs) for pairs in self._times)

    @property
    def whole(self) -> float:
        """Seconds of all calls so far."""
        return sum(self._between(*pair) for pair in self._calls)

    def _computed(self, compute: Compute, behind: Behind) -> Tensor:
        self._behind = behind
        before, spent = self._now(), self.spent
        try:
            value = compute()
        finally:
            self._behind = None
        after = self._now()
        if not isinstance(after, float):
            self._calls.append((before, after))
        else:
            self._calls.append((before, after - (self.spent - spent)))
        return value

    def _drawn_of(self, value: Tensor, count: int) -> Tensor:
        """At most so many of the elements."""
        value = value.flatten()
        size = value.numel()
        if size > count:
            if (size, count) not in self._drawn:
                draws = torch.Generator().manual_seed(size)
                at = torch.randint(size, (count,), generator=draws)
                self._drawn[size, count] = at.sort().values.to(value.device)
            value = value[self._drawn[size, count]] * math.sqrt(size / count)
        return value

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return processor_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, stop: Any) -> float:
        if isinstance(start, float):
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def _pieces(names: Sequence[str], parts: Sequence[Range]) -> list[_Piece]:
    """Parts of layers of several kinds are seen kind by kind: others may have other streams."""
    found = []
    for part, (start, stop) in enumerate(parts):
        at = start
        for _, members in groupby(names[start:stop], key=lambda name: name.rpartition(".")[0]):
            length = len(list(members))
            found.append(_Piece(part, at, at + length))
            at += length
    return found
