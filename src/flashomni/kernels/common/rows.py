"""Where a stream's rows lie in the sequence that symbols are about."""

from __future__ import annotations

from torch import Tensor

from flashomni.symbols import Symbols


def check_rows(name: str, rows: int, row_offset: int, symbols: Symbols, batch: int) -> None:
    """Refuse rows that lie outside the sequence of ``symbols``."""
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
