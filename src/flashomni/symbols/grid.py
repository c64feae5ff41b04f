"""How a token sequence is cut into blocks, and what its tokens are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashomni.symbols.bits import in_range, pack_bits, q_bytes, row_bytes
from flashomni.symbols.order import ORDERS, Shape, coordinates, to_device

Span = tuple[int, int]
KINDS = ("text", "reference")


@dataclass(frozen=True)
class Grid:
    """How a token sequence is cut into blocks, and what its tokens are.

    A token is text, or reference (of a picture that is given, say), or neither: then it is one of
    those that are generated, and ``shape`` is about them. Vision is all that is not text. A block
    that holds at least one text token is a *text block*, wherever it is.

    Args:
        seqlen_q: number of query tokens, at least 1.
        seqlen_kv: number of key tokens, at least 1.
        text: ``(start, stop)`` token range of the text, where there is one and it sits at the start
            (FLUX) or at the end (HunyuanVideo in diffusers) of the sequence; empty by default.
        block_m: query tokens per block, a positive multiple of 16.
        block_n: key tokens per block, a positive multiple of 16.
        kv_len: optional ``[B]`` int32, the number of valid keys of each batch item when padding
            sits at the end; ``None`` means all of them.
        shape: ``(T, H, W)`` of the generated tokens: frames, rows and columns; ``None`` if unknown.
        order: how these run through the sequence: ``raster``, ``tile`` or ``hilbert``; see
            :func:`flashomni.symbols.order.permutation`.
        spans: further ``(kind, start, stop)`` token ranges, ``text`` or ``reference``, anywhere.

    Attributes:
        text_spans: token ranges of all text, in order.

    Raises:
        ValueError: a size is out of range, ``text`` sits neither at the start nor at the end, spans
            overlap, or ``shape`` has another number of tokens than are generated.
    """

    seqlen_q: int
    seqlen_kv: int
    text: Span = (0, 0)
    block_m: int = 128
    block_n: int = 128
    kv_len: Tensor | None = field(default=None, compare=False)
    shape: Shape | None = None
    order: str = "raster"
    spans: tuple[tuple[str, int, int], ...] = ()
    text_spans: tuple[Span, ...] = field(init=False, repr=False, compare=False)
    _taken: tuple[Span, ...] = field(init=False, repr=False, compare=False)
    _constants: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("seqlen_q", "seqlen_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("block_m", "block_n"):
            block = getattr(self, name)
            if block < 16 or block % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {block}")
        start, stop = self.text
        self._check_span("text", start, stop)
        if start > 0 and stop > start and stop != self.seqlen_q:
            raise ValueError(
                f"text must sit at the start or at the end of the {self.seqlen_q} tokens, "
                f"got {self.text}; name text elsewhere in spans"
            )
        kv_len = self.kv_len
        if kv_len is not None and (kv_len.dtype != torch.int32 or kv_len.ndim != 1):
            raise ValueError(
                f"kv_len must be int32 of shape [B], got {kv_len.dtype} {tuple(kv_len.shape)}"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        self._check_spans()
        self._check_shape()

    def _check_span(self, name: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= min(self.seqlen_q, self.seqlen_kv):
            raise ValueError(
                f"{name} must be a token range inside the sequence of {self.seqlen_q} query and "
                f"{self.seqlen_kv} key tokens, got {(start, stop)}"
            )
        if stop > start and self.seqlen_q != self.seqlen_kv:
            raise ValueError(
                f"a {name} span needs query and key tokens to be the same sequence, got "
                f"seqlen_q={self.seqlen_q} and seqlen_kv={self.seqlen_kv}"
            )

    def _check_spans(self) -> None:
        if not isinstance(self.spans, tuple) or not all(
            isinstance(span, tuple) and len(span) == 3 for span in self.spans
        ):
            raise ValueError(
                f"spans must be a tuple of (kind, start, stop) tuples, got {self.spans!r}"
            )
        for kind, start, stop in self.spans:
            if kind not in KINDS:
                raise ValueError(f"the kind of a span must be {' or '.join(KINDS)}, got {kind!r}")
            self._check_span(kind, start, stop)
        text, reference = self._of_kind("text"), self._of_kind("reference")
        object.__setattr__(self, "text_spans", tuple(sorted(text)))
        object.__setattr__(self, "_taken", tuple(sorted(text + reference)))
        for (_, stop), (start, end) in itertools.pairwise(self._taken):
            if start < stop:
                raise ValueError(
                    f"text and spans must not overlap, got {(start, end)} before token {stop} "
                    f"in text {self.text} and spans {self.spans}"
                )

    def _check_shape(self) -> None:
        shape = self.shape
        if shape is None:
            return
        if (
            not isinstance(shape, tuple)
            or len(shape) != 3
            or not all(isinstance(x, int) and x > 0 for x in shape)
        ):
            raise ValueError(f"shape must be (T, H, W), positive integers, or None, got {shape!r}")
        if self.seqlen_q != self.seqlen_kv:
            raise ValueError(
                "shape needs query and key tokens to be the same sequence, got "
                f"seqlen_q={self.seqlen_q} and seqlen_kv={self.seqlen_kv}"
            )
        if math.prod(shape) != self.num_generated:
            raise ValueError(
                "shape must have as many tokens as are neither text nor reference, "
                f"{self.num_generated}, got {shape} = {math.prod(shape)}"
            )

    @property
    def num_q_blocks(self) -> int:
        return -(-self.seqlen_q // self.block_m)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.seqlen_kv // self.block_n)

    @property
    def num_generated(self) -> int:
        """Query tokens that are neither text nor reference."""
        return self.seqlen_q - sum(stop - start for start, stop in self._taken)

    @property
    def vision(self) -> Span:
        """Token range that is not text.

        Raises:
            ValueError: text sits between vision tokens, so that they are no single range.
        """
        ranges = _complement(self.text_spans, self.seqlen_q)
        if len(ranges) > 1:
            raise ValueError(f"vision tokens must be one range, got {ranges} in a {self}")
        return ranges[0] if ranges else (self.seqlen_q, self.seqlen_q)

    @property
    def text_q_ranges(self) -> tuple[Span, ...]:
        """Ranges of query blocks that hold at least one text token."""
        return _blocks(self.text_spans, self.block_m)

    @property
    def text_kv_ranges(self) -> tuple[Span, ...]:
        """Ranges of key blocks that hold at least one text token."""
        return _blocks(self.text_spans, self.block_n)

    @property
    def vision_q_ranges(self) -> tuple[Span, ...]:
        """Ranges of query blocks without any text token."""
        return _complement(self.text_q_ranges, self.num_q_blocks)

    @property
    def vision_kv_ranges(self) -> tuple[Span, ...]:
        """Ranges of key blocks without any text token."""
        return _complement(self.text_kv_ranges, self.num_kv_blocks)

    @property
    def text_q_share(self) -> float:
        """Share of the query blocks that hold text."""
        return sum(stop - start for start, stop in self.text_q_ranges) / self.num_q_blocks

    def is_text(self, start: int, stop: int) -> bool:
        """Whether all tokens from ``start`` to ``stop`` are text of one span."""
        return any(first <= start and stop <= last for first, last in self.text_spans)

    def given_q_mask(self, device: torch.device) -> Tensor:
        """True at the query blocks that hold text or reference tokens: bool ``[Mb]``."""
        ranges = _blocks(self._taken, self.block_m)
        return self._once(("given q", device), lambda: _mask(self.num_q_blocks, ranges, device))

    def given_kv_mask(self, device: torch.device) -> Tensor:
        """True at the key blocks that hold text or reference tokens: bool ``[Nb]``."""
        ranges = _blocks(self._taken, self.block_n)
        return self._once(("given kv", device), lambda: _mask(self.num_kv_blocks, ranges, device))

    def generated_index(self, position: Tensor) -> Tensor:
        """How many generated tokens (neither text nor reference) come before each position."""
        index = position
        for start, stop in self._taken:
            index = index - (position - start).clamp(0, stop - start)
        return index

    def coordinates(self, device: torch.device) -> Tensor:
        """Frame, row and column of the generated tokens, in their order: int64 ``[3, N]``.

        Raises:
            ValueError: the shape is unknown.
        """
        if self.shape is None:
            raise ValueError(f"coordinates need a grid with a shape, got a {self}")
        shape, order = self.shape, self.order
        return self._once(
            ("coordinates", device), lambda: to_device(coordinates(shape, order), device)
        )

    def extents(self, block: int, device: torch.device) -> Tensor:
        """The first and the last frame, row and column that each block has tokens of.

        Args:
            block: tokens of a block: ``block_m`` or ``block_n``.
            device: of the result.

        Returns:
            int64 ``[2, 3, ceil(N / block)]``; of a block without generated tokens the last are
            before the first.

        Raises:
            ValueError: the shape is unknown.
        """
        return self._once(("extents", block, device), lambda: self._extents(block, device))

    def _extents(self, block: int, device: torch.device) -> Tensor:
        places = self.coordinates(device)
        count = -(-self.seqlen_q // block)
        token = torch.arange(count * block, device=device).view(count, block)
        index = self.generated_index(token)
        has_place = (self.generated_index(token + 1) > index) & (token < self.seqlen_q)
        places = places[:, index.clamp(max=places.shape[1] - 1)]  # [3, blocks, block]
        beyond = self.seqlen_q
        first = torch.where(has_place, places, beyond).amin(-1)
        return torch.stack([first, torch.where(has_place, places, -1).amax(-1)])

    def text_q_mask(self, device: torch.device) -> Tensor:
        """True at the text query blocks: bool ``[Mb]``."""
        return self._once(
            ("q", device), lambda: _mask(self.num_q_blocks, self.text_q_ranges, device)
        )

    def text_q_bits(self, device: torch.device) -> Tensor:
        """1 at the text query blocks: uint8 ``[ceil(Mb / 8)]``."""
        mask, num_bytes = self.text_q_mask, q_bytes(self.num_q_blocks)
        return self._once(("q bits", device), lambda: pack_bits(mask(device), num_bytes))

    def text_kv_bits(self, device: torch.device) -> Tensor:
        """1 at the text key blocks: uint8 ``[row_bytes]``."""
        return self._once(("kv", device), lambda: self._kv_bits(self.text_kv_ranges, device))

    def all_q_bits(self, device: torch.device) -> Tensor:
        """1 at every query block: uint8 ``[ceil(Mb / 8)]``."""
        rows = self.num_q_blocks
        every = ((0, rows),)
        return self._once(
            ("all q", device), lambda: pack_bits(_mask(rows, every, device), q_bytes(rows))
        )

    def vision_kv_index(self, device: torch.device) -> Tensor:
        """The key blocks without any text token, in order: int32."""
        ranges = self.vision_kv_ranges
        return self._once(
            ("vision kv", device),
            lambda: torch.cat(
                [torch.arange(*span, device=device, dtype=torch.int32) for span in ranges]
            ),
        )

    def all_kv_bits(self, device: torch.device) -> Tensor:
        """1 at every key block: uint8 ``[row_bytes]``."""
        every = ((0, self.num_kv_blocks),)
        return self._once(("all", device), lambda: self._kv_bits(every, device))

    def _kv_bits(self, ranges: tuple[Span, ...], device: torch.device) -> Tensor:
        columns = self.num_kv_blocks
        return pack_bits(_mask(columns, ranges, device), row_bytes(columns))

    def _of_kind(self, kind: str) -> list[Span]:
        ranges = [(start, stop) for of, start, stop in self.spans if of == kind]
        if kind == "text":
            ranges.append(self.text)
        return [(start, stop) for start, stop in ranges if stop > start]

    def _once(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """A constant of this grid, made at its first use: each costs several launches."""
        if torch.compiler.is_compiling():  # a graph folds constants, and must not keep tensors
            return make()
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def with_kv_len(self, kv_len: Tensor | None, *, apart: bool = False) -> Grid:
        """This grid with other valid key counts; what is made once is made once for both.

        Args:
            kv_len: ``[B]`` int32, or ``None``.
            apart: what the new grid makes from now on it keeps for itself, as in the capture of a
                graph, where nothing is computed yet.
        """
        grid = replace(self, kv_len=kv_len)
        constants = dict(self._constants) if apart else self._constants
        object.__setattr__(grid, "_constants", constants)
        return grid

    def __str__(self) -> str:
        return (
            f"grid of {self.seqlen_q} x {self.seqlen_kv} tokens, "
            f"blocks {self.block_m} x {self.block_n}, text {self._text_words()}"
        )

    def _text_words(self) -> str:
        return " and ".join(map(str, self.text_spans)) or str(self.text)


def _blocks(spans: tuple[Span, ...], block: int) -> tuple[Span, ...]:
    """Ranges of blocks that hold a token of the spans (sorted), as few as possible."""
    ranges: list[Span] = []
    for start, stop in spans:
        first, last = start // block, -(-stop // block)
        if ranges and first <= ranges[-1][1]:
            first, last = ranges[-1][0], max(last, ranges.pop()[1])
        ranges.append((first, last))
    return tuple(ranges)


def _complement(ranges: tuple[Span, ...], count: int) -> tuple[Span, ...]:
    """The ranges between sorted ``ranges`` of 0 to ``count``; empty ones are left out."""
    edges = [0, *(edge for span in ranges for edge in span), count]
    between = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, stop) for start, stop in between if stop > start)


def _mask(count: int, ranges: tuple[Span, ...], device: torch.device) -> Tensor:
    """True at the indices of the ranges: bool ``[count]``."""
    mask = in_range(count, ranges[0] if ranges else (0, 0), device)
    for span in ranges[1:]:
        mask = mask | in_range(count, span, device)
    return mask
