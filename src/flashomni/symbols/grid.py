"""How a token sequence is cut into blocks, and what its tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashomni.symbols.bits import in_range, pack_bits, q_bytes, row_bytes

Span = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """How a token sequence is cut into blocks, and which tokens are text.

    A block that holds at least one text token is a *text block*; text may sit at the start (FLUX)
    or at the end (HunyuanVideo in diffusers) of the sequence.

    Args:
        seqlen_q: number of query tokens, at least 1.
        seqlen_kv: number of key tokens, at least 1.
        text: ``(start, stop)`` token range of the text; empty by default.
        block_m: query tokens per block, a positive multiple of 16.
        block_n: key tokens per block, a positive multiple of 16.
        kv_len: optional ``[B]`` int32, the number of valid keys of each batch item when padding
            sits at the end; ``None`` means all of them.

    Raises:
        ValueError: a size is out of range, or text sits neither at the start nor at the end.
    """

    seqlen_q: int
    seqlen_kv: int
    text: Span = (0, 0)
    block_m: int = 128
    block_n: int = 128
    kv_len: Tensor | None = field(default=None, compare=False)
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
        if not 0 <= start <= stop <= min(self.seqlen_q, self.seqlen_kv):
            raise ValueError(
                f"text must be a token range inside the sequence of {self.seqlen_q} query and "
                f"{self.seqlen_kv} key tokens, got {self.text}"
            )
        if stop > start and self.seqlen_q != self.seqlen_kv:
            raise ValueError(
                "a text span needs query and key tokens to be the same sequence, got "
                f"seqlen_q={self.seqlen_q} and seqlen_kv={self.seqlen_kv}"
            )
        if start > 0 and stop > start and stop != self.seqlen_q:
            raise ValueError(
                f"text must sit at the start or at the end of the {self.seqlen_q} tokens, "
                f"got {self.text}"
            )
        kv_len = self.kv_len
        if kv_len is not None and (kv_len.dtype != torch.int32 or kv_len.ndim != 1):
            raise ValueError(
                f"kv_len must be int32 of shape [B], got {kv_len.dtype} {tuple(kv_len.shape)}"
            )

    @property
    def num_q_blocks(self) -> int:
        return -(-self.seqlen_q // self.block_m)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.seqlen_kv // self.block_n)

    @property
    def vision(self) -> Span:
        """Token range that is not text."""
        start, stop = self.text
        return (stop, self.seqlen_q) if start == 0 else (0, start)

    @property
    def text_q_blocks(self) -> Span:
        """Range of query blocks that hold at least one text token."""
        return _blocks(self.text, self.block_m)

    @property
    def text_kv_blocks(self) -> Span:
        """Range of key blocks that hold at least one text token."""
        return _blocks(self.text, self.block_n)

    @property
    def vision_q_blocks(self) -> Span:
        """Range of query blocks without any text token."""
        return _complement(self.text_q_blocks, self.num_q_blocks)

    @property
    def vision_kv_blocks(self) -> Span:
        """Range of key blocks without any text token."""
        return _complement(self.text_kv_blocks, self.num_kv_blocks)

    def text_q_mask(self, device: torch.device) -> Tensor:
        """True at the text query blocks: bool ``[Mb]``."""
        return self._once(
            ("q", device), lambda: in_range(self.num_q_blocks, self.text_q_blocks, device)
        )

    def text_q_bits(self, device: torch.device) -> Tensor:
        """1 at the text query blocks: uint8 ``[ceil(Mb / 8)]``."""
        mask, num_bytes = self.text_q_mask, q_bytes(self.num_q_blocks)
        return self._once(("q bits", device), lambda: pack_bits(mask(device), num_bytes))

    def text_kv_bits(self, device: torch.device) -> Tensor:
        """1 at the text key blocks: uint8 ``[row_bytes]``."""
        return self._once(("kv", device), lambda: self._kv_bits(self.text_kv_blocks, device))

    def all_kv_bits(self, device: torch.device) -> Tensor:
        """1 at every key block: uint8 ``[row_bytes]``."""
        return self._once(("all", device), lambda: self._kv_bits((0, self.num_kv_blocks), device))

    def _kv_bits(self, span: Span, device: torch.device) -> Tensor:
        columns = self.num_kv_blocks
        return pack_bits(in_range(columns, span, device), row_bytes(columns))

    def _once(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """A constant of this grid, made at its first use: each costs several launches."""
        if torch.compiler.is_compiling():  # a graph folds constants, and must not keep tensors
            return make()
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def with_kv_len(self, kv_len: Tensor | None) -> Grid:
        """This grid with other valid key counts (``[B]`` int32)."""
        return replace(self, kv_len=kv_len)

    def __str__(self) -> str:
        return (
            f"grid of {self.seqlen_q} x {self.seqlen_kv} tokens, "
            f"blocks {self.block_m} x {self.block_n}, text {self.text}"
        )


def _blocks(span: Span, block: int) -> Span:
    start, stop = span
    return (start // block, -(-stop // block)) if stop > start else (0, 0)


def _complement(text: Span, count: int) -> Span:
    return (text[1], count) if text[0] == 0 else (0, text[0])
