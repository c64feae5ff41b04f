"""The packed symbols of one attention layer, and the invariants that every policy's must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashomni.symbols.bits import in_range, pack_bits, q_bytes, row_bytes, unpack_bits
from flashomni.symbols.grid import Grid


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
        want_q = q_bytes(self.grid.num_q_blocks)
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
        q_bits = pack_bits(q_mask, q_bytes(rows))
        kv_bits = pack_bits(kv_mask, row_bytes(columns))
        return cls.of_bits(q_bits, kv_bits, grid, skip_text_columns=skip_text_columns)

    @classmethod
    def of_bits(
        cls, q_bits: Tensor, kv_bits: Tensor, grid: Grid, *, skip_text_columns: bool = False
    ) -> Symbols:
        """Like :meth:`pack`, from masks that are packed already, their padding bits 0."""
        symbols, device = cls(q_bits, kv_bits, grid), q_bits.device
        has_text = bool(grid.text_spans)
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
        where = torch.get_default_device() if device is None else torch.device(device)
        return cls._of_rows(grid.all_q_bits(where), batch, num_heads, grid)

    @classmethod
    def cached(
        cls,
        grid: Grid,
        batch: int = 1,
        num_heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Symbols:
        """Every vision query block cached, text computed; all key blocks visited. Shared bits."""
        where = torch.get_default_device() if device is None else torch.device(device)
        return cls._of_rows(grid.text_q_bits(where), batch, num_heads, grid)

    @classmethod
    def _of_rows(cls, q_row: Tensor, batch: int, num_heads: int, grid: Grid) -> Symbols:
        """S_c of all heads, every key block visited: constants of the grid, which nobody writes."""
        kv_row = grid.all_kv_bits(q_row.device).expand(batch, num_heads, grid.num_q_blocks, -1)
        return cls(q_row.expand(batch, num_heads, -1), kv_row, grid)

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

    def fill_rows(self, min_skip: float) -> Symbols:
        """Visit every key block in the rows that would skip less than ``min_skip`` of them.

        Below some share, skipping costs more time than it saves; such a row is better exact.
        """
        skipped = (~self.kv_mask()).float().mean(-1, keepdim=True)
        every = self.grid.all_kv_bits(self.kv_bits.device)
        filled = torch.where(skipped < min_skip, every, self.kv_bits)
        return replace(self, kv_bits=filled)

    def to(self, device: torch.device | str) -> Symbols:
        """These symbols on another device (the grid's ``kv_len`` as well)."""
        kv_len = self.grid.kv_len
        grid = self.grid.with_kv_len(None if kv_len is None else kv_len.to(device))
        return Symbols(self.q_bits.to(device), self.kv_bits.to(device), grid)
