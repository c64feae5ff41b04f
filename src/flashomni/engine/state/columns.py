"""The columns that a layer keeps: S_s as it was chosen, and D, which belongs to it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage
from flashomni.symbols import Symbols


@dataclass(eq=False)
class Columns:
    """S_s of a layer from one choice to the next.

    Attributes:
        symbols: every tile computed, columns as chosen.
        density: share of the block pairs that are visited, on the device.
        q_bits: S_c that came with them; ``None`` where it is chosen at every Update.
    """

    symbols: Symbols
    density: Tensor | float
    q_bits: Tensor | None = None

    @classmethod
    def of(cls, chosen: Symbols, text_rows: bool) -> Columns:
        """The columns of chosen symbols.

        Args:
            chosen: S_c of them does not matter.
            text_rows: rows of text visit every key.
        """
        grid, device = chosen.grid, chosen.q_bits.device
        kv_bits = chosen.kv_bits
        if text_rows and grid.text_spans:
            is_text = grid.text_q_mask(device)[:, None]
            kv_bits = torch.where(is_text, grid.all_kv_bits(device), kv_bits)
        symbols = every_tile(replace(chosen, kv_bits=kv_bits))
        return cls(symbols, symbols.kv_density())

    def rest(self) -> Symbols:
        """Every tile computed, with the blocks that these columns skip."""
        symbols = self.symbols
        every = symbols.grid.all_kv_bits(symbols.kv_bits.device)
        return replace(symbols, kv_bits=~symbols.kv_bits & every)

    def under(self, q_bits: Tensor) -> Symbols:
        """These columns with other tiles."""
        return replace(self.symbols, q_bits=q_bits)


def every_tile(symbols: Symbols) -> Symbols:
    """The same columns, every tile computed."""
    every = symbols.grid.all_q_bits(symbols.q_bits.device)
    return replace(symbols, q_bits=every.expand(symbols.batch, symbols.num_heads, -1))


def every_column(symbols: Symbols) -> Symbols:
    """The same tiles, every key visited."""
    grid = symbols.grid
    every = grid.all_kv_bits(symbols.kv_bits.device)
    shape = (symbols.batch, symbols.num_heads, grid.num_q_blocks, -1)
    return replace(symbols, kv_bits=every.expand(shape))


class Carry:
    """D of one layer: what dense attention has more than sparse attention with these columns.

    Behind the output projection, of all heads together, where it can be read; else in front of it.

    Args:
        columns: what D belongs to.
        order: 1 keeps its last change too.
        storage: how to keep them.
    """

    def __init__(self, columns: Columns, order: int, storage: Storage) -> None:
        self._columns, self._order, self._storage = columns, order, storage
        self._streams: dict[int, tuple[History, bool]] = {}

    def belongs_to(self, symbols: Symbols) -> bool:
        """Whether D is the difference for these columns: the same ones, not equal ones."""
        own = self._columns.symbols
        return symbols.kv_bits is own.kv_bits and symbols.grid == own.grid

    def put(self, row_offset: int, value: Tensor, projected: bool, step: int) -> None:
        """D of the rows of one stream, made in a refresh; ``value`` is the carry's from now on."""
        history, was = self._streams.get(row_offset, (None, projected))
        if history is None or was is not projected:
            keep = self._order + 1
            history = History(self._order, keep, self._storage, halved=True)
        history.push(value, step, own=True)
        self._streams[row_offset] = history, projected

    def has(self, row_offset: int, projected: bool) -> bool:
        """Whether there is D of these rows on this side of the projection."""
        return self._streams.get(row_offset, (None, not projected))[1] is projected

    def stream(self, row_offset: int, projected: bool) -> History:
        """D of the rows of one stream.

        Raises:
            RuntimeError: there is none, or it lies on the other side of the output projection.
        """
        history, was = self._streams.get(row_offset, (None, projected))
        if history is None:
            raise RuntimeError(
                f"no difference is carried for the rows from token {row_offset} on: the block did "
                "not project them in the last refresh"
            )
        if was is not projected:
            raise RuntimeError(
                "the output projection changed within a generation; load or remove adapters "
                "between generations"
            )
        return history

    def prefetch(self, refreshes: bool) -> None:
        """It is needed soon: all of it, or what the differences of a refresh are taken to."""
        for history, _ in self._streams.values():
            history.prefetch(self._order if refreshes else None)

    def settle(self) -> None:
        """Long work was launched behind what went to the host: its memory may go."""
        if self._storage.lane is not None:
            self._storage.lane.flush()

    def tensors(self) -> list[Tensor]:
        """Everything that is kept, for accounting."""
        return [t for history, _ in self._streams.values() for t in history.tensors()]
