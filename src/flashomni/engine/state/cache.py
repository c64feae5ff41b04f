"""What one layer remembers between steps, in one branch (cond, uncond, ...) of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashomni.engine.state.storage import Kept, Storage, parts
from flashomni.kernels.elementwise.op import differences, weighted_sum
from flashomni.symbols import Symbols

if TYPE_CHECKING:
    from flashomni.engine.state.columns import Carry, Columns


class History:
    """A value at its last steps, as the value and its differences per step: f_0 .. f_order.

    f_i is i! times the divided difference over the newest i + 1 anchors, whatever their distances
    (for equal ones the backward differences of TaylorSeer, arXiv 2503.06923). Differences are exact
    only between values of one quantity; they are taken in fp32.

    Args:
        order: highest difference to give.
        keep: how many terms to keep from one push to the next: ``order`` is enough to go on,
            ``order + 1`` to evaluate a forecast from the history itself.
        storage: how to keep them.
        wide: keep terms of fp16 values in fp32: a sum over layers, or a difference of two, may be
            out of the range of fp16 where the values are not.
        halved: keep term i of fp16 values divided by 2**i, which always is in the range of fp16, as
            a difference of two values need not be. The forecast's weights must make up for it.

    Attributes:
        times: steps of the anchors that the terms are of, oldest first.
    """

    def __init__(
        self, order: int, keep: int, storage: Storage, wide: bool = False, halved: bool = False
    ) -> None:
        self.order, self.keep, self.storage = order, keep, storage
        self._wide, self._halved = wide, halved
        self.times: tuple[int, ...] = ()
        self._kept: list[Kept] = []
        self._dtype = torch.float32

    def __len__(self) -> int:
        return len(self._kept)

    def push(
        self, value: Tensor, step: int, minus: Tensor | None = None, own: bool = False
    ) -> list[Tensor]:
        """Add the value (less ``minus``) of ``step``; return the terms f_0 .. f_i known by now.

        Args:
            value: of the step.
            step: later than the one before; else a new history begins.
            minus: what to subtract.
            own: whether ``value`` is the history's from now on, and need not be copied.
        """
        if self.times and step <= self.times[-1]:
            self.times, self._kept = (), []
        old = [kept.get() for kept in self._kept[: self.order]][: len(self.times)]
        gaps = [(step - self.times[-i]) / i for i in range(1, len(old) + 1)]
        is_half = value.dtype == torch.float16
        dtype = torch.float32 if self._wide and is_half else value.dtype
        if self._halved and is_half:
            gaps = [2 * gap for gap in gaps]
        if own and minus is None and self.storage.lane is not None and dtype == value.dtype:
            terms = self._differences_in_place(value, old, gaps)
        else:
            terms = differences(value, minus, old, gaps, dtype, backend=self.storage.backend)
        self.times = (*self.times, step)[-len(terms) :]
        self._dtype = value.dtype
        while len(self._kept) < min(len(terms), self.keep):
            self._kept.append(Kept(self.storage))
        for kept, term in zip(self._kept, terms, strict=False):
            kept.put(term)
        return terms

    def _differences_in_place(
        self, value: Tensor, old: list[Tensor], gaps: list[float]
    ) -> list[Tensor]:
        """The same terms, in the memory of ``value`` and of ``old``, which came from the host."""
        for rows in parts(value) if old else ():
            before = [term[:, rows] for term in old]
            new = differences(value[:, rows], None, before, gaps, backend=self.storage.backend)
            for term, part in zip(before, new[1:], strict=True):
                term.copy_(part)
        return [value, *old]

    def terms(self) -> list[Tensor]:
        """The terms that are kept, on their device."""
        return [kept.get() for kept in self._kept]

    def predict(self, coefficients: Tensor, base: Tensor | None = None) -> Tensor:
        """``base + sum_i coefficients[i] * f_i``, of the terms that are kept."""
        backend = self.storage.backend
        return weighted_sum(self.terms(), coefficients, base, self._dtype, backend=backend)

    def miss(
        self, coefficients: Tensor, value: Tensor, minus: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """How far a forecast is off: squared norms of the error and of the value, fp32 scalars."""
        true = value.float() if minus is None else value.float() - minus.float()
        off = self.predict(coefficients).float() - true
        return off.square().sum(), true.square().sum()

    def prefetch(self, count: int | None = None) -> None:
        """The terms are needed soon; or the first ``count`` of them."""
        for kept in self._kept[:count]:
            kept.prefetch()

    def tensors(self) -> list[Tensor]:
        return [tensor for kept in self._kept for tensor in kept.tensors()]


class Fraction:
    """A number measured on the device that the host reads later, without waiting for it now.

    At the end of the call that measured it, :func:`send` starts the copy; the host reads it one
    interval later, when it is long complete.
    """

    def __init__(self, value: Tensor) -> None:
        self._value: Tensor = value
        self._event: torch.cuda.Event | None = None
        self._number: float | None = None
        self.sent = False

    @property
    def value(self) -> Tensor:
        """The scalar, on the device or on its way."""
        return self._value

    def put(self, value: Tensor, event: torch.cuda.Event | None) -> None:
        """The number is on its way to ``value``, where it is after the event."""
        self._value, self._event, self.sent = value, event, True

    def read(self) -> float:
        if self._number is None:
            if self._event is not None:
                self._event.synchronize()
            self._number = float(self._value)
        return self._number


def send(fractions: list[Fraction]) -> None:
    """Start the way of all of them to the host: one copy."""
    if not fractions:
        return
    values, event = torch.stack([fraction.value for fraction in fractions]), None
    if values.is_cuda:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        values = host
    for fraction, value in zip(fractions, values, strict=True):
        fraction.put(value, event)


@dataclass
class LayerCache:
    """State of one layer in one branch.

    Attributes:
        symbols: of the current interval.
        everywhere: S_c of all heads, where ``symbols`` are of a rank's own.
        history: of O, for the rows that the output projection sees.
        bias_terms: ``[T, B, R, N]`` projected terms of the cached heads, of the forecast so far.
        rows: token range of ``history`` in the sequence.
        projected: whether the forecast happens after the output projection.
        degraded: whether it is cached whole in this interval.
        q_density: share of tiles that ``symbols`` computes, on the device.
        kv_density: share of block pairs visited in them.
        live_shares: share of computed (token, head) pairs by stream.
        ops: what the layer recorded when it last ran: the FLOPs that a bypass saves.
        fraction: computed fraction of S_c, as measured at the last Update (or by a probe).
        measured: the step of that.
        bias_times: anchors of ``bias_terms``.
        attended: shape of the queries that were last attended in full.
        columns: S_s where it is kept from one choice to the next.
        carry: what sparse attention with these columns misses.
        beside: of another attention of the same layer, where there is one.
    """

    symbols: Symbols | None = None
    everywhere: Symbols | None = None
    history: History | None = None
    bias_terms: Kept | None = None
    rows: tuple[int, int] = (0, 0)
    projected: bool = True
    degraded: bool = False
    q_density: Tensor | float = 1.0
    kv_density: Tensor | float = 1.0
    live_shares: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    ops: list[tuple[str, int, Any]] = field(default_factory=list)
    fraction: Fraction | None = None
    measured: int = -1
    bias_times: tuple[int, ...] = ()
    attended: tuple[int, ...] = ()
    columns: Columns | None = None
    carry: Carry | None = None
    beside: LayerCache | None = None

    def second(self) -> LayerCache:
        """State of the layer's other attention."""
        if self.beside is None:
            self.beside = LayerCache()
        return self.beside

    @property
    def chosen(self) -> Symbols | None:
        """Tiles and columns that were chosen last."""
        if self.columns is None or self.symbols is None:
            return self.symbols if self.columns is None else self.columns.symbols
        return self.columns.under(self.symbols.q_bits)

    def keep(self, columns: Columns) -> None:
        """Other columns than before: what was carried is of no use any more."""
        self.columns, self.carry = columns, None

    def degrade(self, known: float | None, step: int, threshold: float, hopeful: bool) -> None:
        """Decide whether the layer is cached whole.

        A fraction that depends on the data is the one of the Update before (of the probe, at
        first), so that the host never waits for the device and every device decides alike.

        Args:
            known: the computed fraction, where it does not depend on the data.
            step: of the generation.
            threshold: the largest fraction that does it; 0 never does.
            hopeful: take it that a layer will be cached whole while nothing is known of it.
        """
        if known is None:
            self.degraded = threshold > 0 and self.expected(step, threshold, hopeful)
        else:
            self.degraded = threshold > 0 and known <= threshold
        if self.degraded:
            self.forget_heads()

    def expected(self, step: int, threshold: float, hopeful: bool) -> bool:
        """Whether the layer is cached whole by what was measured; see :meth:`degrade`."""
        just_measured = step - self.measured < 2  # it may be under way still
        if self.fraction is None or (hopeful and just_measured):
            return hopeful
        return self.fraction.read() <= threshold

    def forget_heads(self) -> None:
        """Drop what only per-head caching needs."""
        self.history = self.bias_terms = None

    def prefetch(self, stores: bool) -> None:
        """The layer runs soon: bring back what its tiles need from the host.

        Args:
            stores: whether it adds to its history, or only dispatches.
        """
        if self.history is not None and (stores or not self.projected):
            self.history.prefetch()
        if self.bias_terms is not None and not stores:
            self.bias_terms.prefetch()
        if self.beside is not None:
            self.beside.prefetch(stores)

    def prefetch_carry(self, refreshes: bool) -> None:
        """The layer runs next: bring back D, which is as large as two of its activations.

        Args:
            refreshes: whether D is made anew.
        """
        if self.carry is not None:
            self.carry.prefetch(refreshes)
        if self.beside is not None:
            self.beside.prefetch_carry(refreshes)

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        kept = [] if self.history is None else list(self.history.tensors())
        if self.bias_terms is not None:
            kept += self.bias_terms.tensors()
        if self.symbols is not None:
            kept += [self.symbols.q_bits, self.symbols.kv_bits]
        if self.everywhere is not None:
            kept.append(self.everywhere.q_bits)
        if self.columns is not None:
            kept.append(self.columns.symbols.kv_bits)
        if self.carry is not None:
            kept += self.carry.tensors()
        if self.beside is not None:
            kept += self.beside.tensors()
        return kept
