"""Sparse symbols: one bit per block says compute or not; everything else in the library reads them.

Letters in shapes: B batch, H num_heads, M seqlen_q, N seqlen_kv, D head_dim,
Mb = ceil(M / block_m) query blocks, Nb = ceil(N / block_n) key blocks.

Two symbols (arXiv 2509.25401, section 3.2):

* S_c, ``q_bits``: 1 = compute the output tile (query block, head), 0 = take it from the cache.
* S_s, ``kv_bits``: 1 = visit the pair (query block, key block), 0 = leave it out of the softmax.

Bits are little endian inside a byte. A row of S_s is padded to whole 32-bit words, so that a
kernel can load words and iterate with find-first-set; padding bits are always 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flashomni.bits import in_range, pack_bits, row_bytes, unpack_bits

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
    def segments(self) -> tuple[tuple[str, Span], ...]:
        """The sequence as ``(kind, token range)`` pairs in order, empty ones left out."""
        parts = sorted([("text", self.text), ("vision", self.vision)], key=lambda part: part[1])
        return tuple((kind, span) for kind, span in parts if span[1] > span[0])

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
        mask, num_bytes = self.text_q_mask, -(-self.num_q_blocks // 8)
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


@dataclass(frozen=True)
class Symbols:
    """The packed symbols of one attention layer. Build them with :meth:`pack` or :meth:`dense`.

    Args:
        q_bits: S_c, uint8 ``[B, H, ceil(Mb / 8)]``.
        kv_bits: S_s, uint8 ``[B, H, Mb, row_bytes]``, row_bytes a multiple of 4.
        grid: what the bits are about.

    Any leading dimension may have stride 0 (shared by the batch or by the heads).
    """

    q_bits: Tensor
    kv_bits: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        want_q = -(-self.grid.num_q_blocks // 8)
        want_kv = (self.grid.num_q_blocks, row_bytes(self.grid.num_kv_blocks))
        if self.q_bits.dtype != torch.uint8 or self.kv_bits.dtype != torch.uint8:
            raise ValueError(
                f"symbols must be uint8, got {self.q_bits.dtype} and {self.kv_bits.dtype}"
            )
        if self.q_bits.ndim != 3 or self.q_bits.shape[-1] != want_q:
            raise ValueError(f"q_bits must be [B, H, {want_q}], got {tuple(self.q_bits.shape)}")
        if self.kv_bits.ndim != 4 or tuple(self.kv_bits.shape[2:]) != want_kv:
            raise ValueError(
                f"kv_bits must be [B, H, {want_kv[0]}, {want_kv[1]}], "
                f"got {tuple(self.kv_bits.shape)}"
            )
        if self.q_bits.shape[:2] != self.kv_bits.shape[:2]:
            raise ValueError(
                f"q_bits {tuple(self.q_bits.shape)} and kv_bits {tuple(self.kv_bits.shape)} "
                "differ in batch or heads"
            )

    @classmethod
    def pack(
        cls, q_mask: Tensor, kv_mask: Tensor, grid: Grid, *, skip_text_columns: bool = False
    ) -> Symbols:
        """Pack boolean masks, after the invariants of every policy have been enforced.

        1. Text query blocks are never cached.
        2. Text key blocks are never skipped (unless ``skip_text_columns``).
        3. Every query block visits at least one key block.

        Text rows may skip vision blocks: a policy that wants them dense says so itself.

        Args:
            q_mask: bool ``[B, H, Mb]``, true = compute; B and H may be 1 sized by ``expand``.
            kv_mask: bool ``[B, H, Mb, Nb]``, true = visit.
            grid: the blocks the masks are about.
            skip_text_columns: the caller explicitly wants text keys to be skippable.
        """
        rows, columns = grid.num_q_blocks, grid.num_kv_blocks
        if q_mask.dtype != torch.bool or kv_mask.dtype != torch.bool:
            raise ValueError(f"masks must be bool, got {q_mask.dtype} and {kv_mask.dtype}")
        if q_mask.ndim != 3 or q_mask.shape[-1] != rows:
            raise ValueError(f"q_mask must be [B, H, {rows}], got {tuple(q_mask.shape)}")
        if kv_mask.ndim != 4 or tuple(kv_mask.shape[-2:]) != (rows, columns):
            raise ValueError(
                f"kv_mask must be [B, H, {rows}, {columns}], got {tuple(kv_mask.shape)}"
            )
        q_bits = pack_bits(q_mask, -(-rows // 8))
        kv_bits = pack_bits(kv_mask, row_bytes(columns))
        return cls.of_bits(q_bits, kv_bits, grid, skip_text_columns=skip_text_columns)

    @classmethod
    def of_bits(
        cls, q_bits: Tensor, kv_bits: Tensor, grid: Grid, *, skip_text_columns: bool = False
    ) -> Symbols:
        """Like :meth:`pack`, from masks that are packed already, their padding bits 0."""
        symbols, device = cls(q_bits, kv_bits, grid), q_bits.device
        has_text = grid.text[1] > grid.text[0]
        if has_text:
            q_bits = q_bits | grid.text_q_bits(device)
        if has_text and not skip_text_columns:
            kv_bits = kv_bits | grid.text_kv_bits(device)  # and no row is empty
        else:
            # Block 0 always holds a valid key; with text last, so does the first text block.
            empty = (kv_bits == 0).all(-1, keepdim=True)
            kv_bits = kv_bits | (empty & in_range(kv_bits.shape[-1], (0, 1), device))
        return replace(symbols, q_bits=q_bits, kv_bits=kv_bits)

    @classmethod
    def dense(
        cls,
        grid: Grid,
        batch: int = 1,
        num_heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Symbols:
        """All bits 1. One row is stored; batch, heads and query blocks share it with stride 0."""
        rows, columns = grid.num_q_blocks, grid.num_kv_blocks
        q_row = pack_bits(torch.ones(rows, dtype=torch.bool, device=device), -(-rows // 8))
        kv_row = pack_bits(torch.ones(columns, dtype=torch.bool, device=device), row_bytes(columns))
        return cls(
            q_row.expand(batch, num_heads, -1), kv_row.expand(batch, num_heads, rows, -1), grid
        )

    @classmethod
    def cached(
        cls,
        grid: Grid,
        batch: int = 1,
        num_heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Symbols:
        """Every vision query block cached, text computed; all key blocks visited. Shared bits."""
        rows, columns = grid.num_q_blocks, grid.num_kv_blocks
        q_mask = torch.zeros(1, 1, rows, dtype=torch.bool, device=device)
        kv_mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=device)
        return cls.pack(q_mask, kv_mask, grid).expand(batch, num_heads)

    def expand(self, batch: int, num_heads: int) -> Symbols:
        """Symbols of one batch item and one head, shared by all with stride 0."""
        return Symbols(
            self.q_bits.expand(batch, num_heads, -1),
            self.kv_bits.expand(batch, num_heads, -1, -1),
            self.grid,
        )

    @property
    def batch(self) -> int:
        return self.q_bits.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q_bits.shape[1]

    def q_mask(self) -> Tensor:
        """S_c as bool ``[B, H, Mb]``."""
        return unpack_bits(self.q_bits, self.grid.num_q_blocks)

    def kv_mask(self) -> Tensor:
        """S_s as bool ``[B, H, Mb, Nb]``, for every query block, cached or not."""
        return unpack_bits(self.kv_bits, self.grid.num_kv_blocks)

    def index_lists(self) -> tuple[Tensor, Tensor]:
        """The visited key blocks of each query block, for backends that want lists.

        Returns:
            ``idx`` int32 ``[B, H, Mb, Nb]``: visited key blocks ascending, then the others; and
            ``cnt`` int32 ``[B, H, Mb]``: how many entries are valid, 0 for a cached query block.
        """
        kv_mask = self.kv_mask()
        idx = torch.argsort(~kv_mask, dim=-1, stable=True).to(torch.int32)
        cnt = kv_mask.sum(-1, dtype=torch.int32) * self.q_mask().to(torch.int32)
        return idx, cnt

    def q_density(self) -> Tensor:
        """Fraction of (query block, head) tiles that are computed: fp32 scalar on the device."""
        return self.q_mask().float().mean()

    def kv_density(self) -> Tensor:
        """Fraction of block pairs visited, of those in computed rows: fp32 scalar."""
        q_mask = self.q_mask()
        visited = (self.kv_mask().float().mean(-1) * q_mask).sum()
        return visited / q_mask.sum().clamp(min=1)

    def density(self) -> Tensor:
        """Fraction of the dense attention that is computed: fp32 scalar on the device."""
        return (self.kv_mask().float().mean(-1) * self.q_mask()).mean()

    def keep_text(self) -> Symbols:
        """These symbols with the invariants of :meth:`pack` enforced again."""
        return Symbols.pack(self.q_mask(), self.kv_mask(), self.grid)

    def fill_rows(self, min_skip: float) -> Symbols:
        """Visit every key block in the rows that would skip less than ``min_skip`` of them.

        Below some share, skipping costs more time than it saves; such a row is better exact.
        """
        skipped = (~self.kv_mask()).float().mean(-1, keepdim=True)
        every = self.grid.all_kv_bits(self.kv_bits.device)
        filled = torch.where(skipped < min_skip, every, self.kv_bits)
        return replace(self, kv_bits=filled)

    def __and__(self, other: Symbols) -> Symbols:
        """Computed where both compute (invariants enforced again: a row is never left empty)."""
        return self._combine(other, torch.bitwise_and).keep_text()

    def __or__(self, other: Symbols) -> Symbols:
        """Computed where either computes."""
        return self._combine(other, torch.bitwise_or)

    def _combine(self, other: Symbols, bitwise: Callable[[Tensor, Tensor], Tensor]) -> Symbols:
        if self.grid != other.grid:
            raise ValueError(f"cannot combine symbols of {self.grid} with those of {other.grid}")
        return Symbols(
            bitwise(self.q_bits, other.q_bits), bitwise(self.kv_bits, other.kv_bits), self.grid
        )

    def to(self, device: torch.device | str) -> Symbols:
        """These symbols on another device (the grid's ``kv_len`` as well)."""
        kv_len = self.grid.kv_len
        grid = self.grid.with_kv_len(None if kv_len is None else kv_len.to(device))
        return Symbols(self.q_bits.to(device), self.kv_bits.to(device), grid)


def pool(x: Tensor, block: int, length: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each block, over the tokens that exist.

    Args:
        x: ``[B, S, H, D]``.
        block: tokens per block.
        length: optional int32 ``[B]``: tokens from there on are padding and are left out.

    Returns:
        fp32 ``[B, H, ceil(S / block), D]``; a block of padding alone is zero.
    """
    seqlen = x.shape[1]
    num_blocks = -(-seqlen // block)
    position = torch.arange(num_blocks * block, device=x.device).view(1, num_blocks, block)
    limit = seqlen if length is None else length.view(-1, 1, 1)
    valid = position < limit  # [1 | B, blocks, block]
    count = valid.sum(-1).clamp(min=1)[..., None, None]  # [1 | B, blocks, 1, 1]
    if length is not None:
        x = x * valid.flatten(1)[:, :seqlen, None, None].to(x.dtype)
    tail = num_blocks * block - seqlen
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x
    total = x.unflatten(1, (num_blocks, block)).sum(2, dtype=torch.float32)
    return (total / count).permute(0, 2, 1, 3)
