"""A layer whose sequence ranks share: its own rows, those of the whole, and what is exchanged.

On one card everything here gives back what it gets.

Letters in shapes: B batch, S tokens, R rows of this rank, H num_heads, h heads of this rank,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashomni.engine.geometry import Geometry
from flashomni.parallel import Sent, Shard
from flashomni.symbols import Symbols

T = TypeVar("T")


class LayerRanks:
    """What a layer knows of the ranks that share its sequence; see :class:`LayerStep`.

    Attributes:
        rows: tokens that the block has, after ``begin``: a part of the grid's, where ranks share
            the sequence.
    """

    rows: int
    geometry: Geometry | None
    inputs: Mapping[str, Any]
    shared: Callable[..., Any]
    _shard: Shard | None
    _num_heads: int = 0  # of the model, once attention was called

    def tokens_of(self, name: str) -> int:
        """Tokens that the block has of one of the model's token streams.

        Args:
            name: of the model's argument ``[B, S, K]``.
        """
        return self.inputs[name].shape[1] if self._shard is None else self._shard.lengths[name]

    def total(self, rows: int) -> int:
        """Tokens of the whole sequence, of which the block has so many.

        What a model hands its blocks beside their streams (masks, RoPE tables) is of these.
        """
        shard = self._shard
        return rows if shard is None or not shard.inside else shard.layout.seqlen

    def whole(self, name: str, x: Tensor) -> int:
        """Tokens of a stream on all ranks.

        Args:
            name: of the stream.
            x: ``[B, R, K]``, what the block has of it.
        """
        shard = self._shard
        if shard is None or not shard.inside:
            return x.shape[1]
        return sum(shard.layout.lengths[shard.names.index(name)])

    def start_of(self, name: str, start: int) -> int:
        """Where a stream begins in the whole sequence.

        Args:
            name: of the stream.
            start: where it begins in what the block has.
        """
        shard = self._shard
        if shard is None or not shard.inside or name not in shard.names:
            return start
        return shard.layout.spans()[shard.names.index(name)][0]

    def own(self, name: str | None, *tables: Tensor) -> tuple[Tensor, ...]:
        """The rows of the block's tokens in tables of the whole; sliced once a call.

        Args:
            name: of the stream that they are of; ``None`` for the whole sequence.
            tables: ``[S, D / 2]`` or ``[B or 1, S, H or 1, D / 2]`` each.
        """
        shard = self._shard
        if shard is None or not shard.inside:
            return tables
        return self.shared(shard.rows_of, name, *tables)

    def send(self, x: Tensor) -> Tensor | Sent:
        """Start the exchange of rows for heads, which goes on while something else is computed.

        Args:
            x: ``[B, R, H, D]``: q, k or v, for :meth:`LayerRun.attend`.
        """
        return x if self._shard is None else self._shard.send_heads(x)

    def _arrived(self, x: Tensor | Sent) -> Tensor:
        """``[B, S, h, D]`` of what was sent, or of what was not yet."""
        sent = x if isinstance(x, Sent) else self.send(x)
        return sent.wait() if isinstance(sent, Sent) else sent

    def _to_rows(self, o: Tensor, meanwhile: Callable[[], object] | None = None) -> Tensor:
        """O of all heads ``[B, R, H, D]``, of what attention gave.

        Args:
            o: ``[B, S, h, D]``.
            meanwhile: what needs no O: it is computed while O is under way, if it is.
        """
        if self._shard is None:
            return o
        sent = self._shard.send_rows(o, self._num_heads)
        if meanwhile is not None:
            meanwhile()
        return sent.wait()

    def all_rows(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` of this rank's ``[B, R, ...]``, the same bits on every rank."""
        return x if self._shard is None else self._shard.leave(x)

    def _heads(self, q: Tensor) -> range:
        """Which heads of the model attention has here."""
        return range(q.shape[2]) if self._shard is None else self._shard.heads(self._num_heads)

    def _all_heads(self, symbols: Symbols) -> Symbols | None:
        """S_c of all heads, where these are of a rank's own."""
        if self._shard is None:
            return None
        return self._shard.everywhere(symbols, self._num_heads)

    def _places(self, row_offset: int, rows: int) -> list[tuple[slice, int]]:
        """Runs of rows that are neighbours in the whole sequence, and where they begin there."""
        if self._shard is None:
            return [(slice(0, rows), row_offset)]
        return self._shard.places(row_offset, rows)

    def _live_rows(self, symbols: Symbols, count: int) -> Tensor:
        """Whether the block's first ``count`` rows are computed: bool ``[B, count, H, 1]``."""
        live = symbols.q_mask().repeat_interleave(symbols.grid.block_m, -1)
        parts = [
            live[..., place : place + rows.stop - rows.start]
            for rows, place in self._places(0, count)
        ]
        return torch.cat(parts, -1).mT[..., None]

    def _agreed(self, choice: int) -> int:
        """The largest choice of any rank. Waits for the device."""
        if self._shard is None:
            return choice
        device = self._shard.ranks.device
        choices = self._shard.ranks.gather(torch.tensor([choice], device=device))
        return int(torch.cat(choices).max())

    def _whole(
        self,
        seqlen: int,
        text: tuple[int, int],
        kv_len: Tensor | None,
        place: dict[str, Any],
    ) -> tuple[int, tuple[int, int], Tensor | None, dict[str, Any]]:
        """What ``begin`` takes, of the whole sequence, where it is spread over ranks."""
        shard = self._shard
        if shard is None:
            return seqlen, text, kv_len, place
        if kv_len is not None and not shard.inside:
            raise NotImplementedError(
                "padded keys are not supported with diffusers' plan of context parallelism; take "
                "accelerate(..., ulysses=n) without enable_parallelism"
            )
        if shard.inside and seqlen == shard.layout.seqlen:  # told of the whole already
            self.rows = shard.layout.rows(shard.rank)
            return seqlen, text, kv_len, place
        text, vision = shard.layout.whole(shard.rank, seqlen, text)
        place = {}
        if self.geometry is not None:
            place = self.geometry.place(vision[0], vision[1] - vision[0])
        return shard.layout.seqlen, text, kv_len, place
