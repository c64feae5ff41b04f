"""Where a stream's rows lie in the sequence that symbols are about."""

from __future__ import annotations

from torch import Tensor

from flashomni.flatten import see_as
from flashomni.kernels.common.checks import check_int
from flashomni.symbols import Grid, Symbols


def check_rows(name: str, rows: int, row_offset: int, symbols: Symbols, batch: int) -> None:
    """Refuse rows that lie outside the sequence of ``symbols``."""
    check_int("row_offset", row_offset)
    seqlen = symbols.grid.seqlen_q
    if row_offset < 0 or row_offset + rows > seqlen:
        raise ValueError(
            f"{name} has {rows} rows, which from row_offset={row_offset} on do not fit in the "
            f"{seqlen} query tokens of the symbols"
        )
    if symbols.batch != batch:
        raise ValueError(f"symbols are for batch {symbols.batch}, but {name} has batch {batch}")


def tile_mask(symbols: Symbols, rows: int, row_offset: int) -> Tensor:
    """S_c per token of a stream: bool ``[B, rows, H]``."""
    block_m = symbols.grid.block_m
    per_token = symbols.q_mask().repeat_interleave(block_m, -1)
    return per_token[..., row_offset : row_offset + rows].mT


def check_symbols(symbols: object) -> None:
    if not isinstance(symbols, Symbols):
        raise ValueError(f"symbols must be Symbols, got {type(symbols).__name__}")


def _take(symbols: Symbols) -> tuple:
    grid = symbols.grid
    sizes = (grid.seqlen_q, grid.seqlen_kv, grid.block_m, grid.block_n)
    return (symbols.q_bits, symbols.kv_bits, *sizes)


def _make(
    q_bits: Tensor, kv_bits: Tensor, seqlen_q: int, seqlen_kv: int, block_m: int, block_n: int
) -> Symbols:
    return Symbols(q_bits, kv_bits, Grid(seqlen_q, seqlen_kv, block_m=block_m, block_n=block_n))


# Backends read bits and sizes; what is text went into the bits.
_SIZES = dict.fromkeys(("seqlen_q", "seqlen_kv", "block_m", "block_n"), int)
see_as(Symbols, {"q_bits": Tensor, "kv_bits": Tensor, **_SIZES}, _take, _make)
