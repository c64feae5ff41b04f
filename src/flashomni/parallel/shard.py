"""A call of a model whose sequence is spread over ranks: rows outside of attention, heads inside.

Outside of attention a rank holds its own rows of each stream, with all heads; inside it holds all
rows in the model's own order, of its own heads (DeepSpeed Ulysses, arXiv 2309.14509). What goes
there is received in its place, a message a stream; what comes back is sent from its place. Heads
that do not divide are shared out unevenly, so that no rank attends to heads that are none.

Letters in shapes: B batch, R rows of this rank, S rows of the whole sequence, H num_heads,
h heads of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from flashomni.parallel.layout import Layout
from flashomni.parallel.ranks import Ranks
from flashomni.symbols import Symbols

Place = tuple[int, slice]  # an item of the batch, and rows of it


class Sent:
    """Rows or heads that are under way.

    Args:
        shape: of what was sent, ``[B, R, H, D]`` or ``[B, S, h, D]``.
        out: what comes instead.
        arrive: waits until it is there.
    """

    def __init__(self, shape: torch.Size, out: Tensor, arrive: Callable[[], None]) -> None:
        self.shape, self._out, self._arrive = shape, out, arrive

    def wait(self) -> Tensor:
        """What came."""
        self._arrive()
        return self._out


class Shard:
    """How a call's sequence is shared out.

    Args:
        ranks: who shares it.
        layout: of the sequence.
        names: of its streams.
        inside: whether the model's blocks alone see a share of it, and everything that they are
            handed beside their streams is of the whole sequence.

    Attributes:
        lengths: rows that this rank has of each stream.
    """

    def __init__(
        self, ranks: Ranks, layout: Layout, names: Sequence[str] = (), inside: bool = False
    ) -> None:
        self.ranks, self.layout, self.names, self.inside = ranks, layout, tuple(names), inside
        self.rank, self.size = ranks.rank, ranks.size
        mine = (lengths[ranks.rank] for lengths in layout.lengths)
        self.lengths = dict(zip(names, mine, strict=False))
        self._counts = [layout.rows(rank) for rank in range(self.size)]
        self._pieces = [layout.pieces(rank) for rank in range(self.size)]

    def only(self, name: str) -> Shard:
        """Of one stream alone, for attention that sees no other."""
        lengths = self.layout.lengths[self.names.index(name)]
        return Shard(self.ranks, Layout((lengths,)), (name,), self.inside)

    def heads(self, num_heads: int, rank: int | None = None) -> range:
        """The heads that a rank attends, this one by default; the first ones may have one more.

        Args:
            num_heads: H.
            rank: whose.

        Raises:
            NotImplementedError: there are more ranks.
        """
        if num_heads < self.size:
            raise NotImplementedError(
                f"{num_heads} heads cannot be shared out among {self.size} ranks: take a smaller "
                "ulysses degree"
            )
        rank = self.rank if rank is None else rank
        share, rest = divmod(num_heads, self.size)
        start = rank * share + min(rank, rest)
        return range(start, start + share + (rank < rest))

    def send_heads(self, x: Tensor) -> Sent:
        """Start ``[B, R, H, D]`` -> ``[B, S, h, D]``."""
        batch, _, num_heads, head_dim = x.shape
        shares = [len(self.heads(num_heads, rank)) for rank in range(self.size)]
        out = x.new_empty(batch, self.layout.seqlen, shares[self.rank], head_dim)
        parts = x.split(shares, 2)
        packed = {rank: parts[rank].contiguous() for rank in self._others}
        sends = {rank: [x[at] for at in self._own(batch)] for rank, x in packed.items()}
        takes = {rank: [out[at] for at in self._whole(rank, batch)] for rank in self._others}
        arrive = self.ranks.exchange(sends, takes)
        for mine, whole in zip(self._own(batch), self._whole(self.rank, batch), strict=True):
            out[whole] = parts[self.rank][mine]
        return Sent(x.shape, out, arrive)

    def send_rows(self, o: Tensor, num_heads: int) -> Sent:
        """Start ``[B, S, h, D]`` -> ``[B, R, H, D]``; ``o`` is not to be changed meanwhile."""
        batch, _, _, head_dim = o.shape
        shares = [len(self.heads(num_heads, rank)) for rank in range(self.size)]
        rows, o = self._counts[self.rank], o.contiguous()
        out = o.new_empty(batch, rows, num_heads, head_dim)
        parts = out.split(shares, 2)
        sends = {rank: [o[at] for at in self._whole(rank, batch)] for rank in self._others}
        came = {rank: o.new_empty(batch, rows, shares[rank], head_dim) for rank in self._others}
        takes = {rank: [x[at] for at in self._own(batch)] for rank, x in came.items()}
        arrive = self.ranks.exchange(sends, takes)
        for mine, whole in zip(self._own(batch), self._whole(self.rank, batch), strict=True):
            parts[self.rank][mine] = o[whole]

        def wait() -> None:
            arrive()
            for rank, x in came.items():
                parts[rank].copy_(x)

        return Sent(o.shape, out, wait)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _own(self, batch: int) -> list[Place]:
        """Where this rank's streams lie in what it holds: contiguous, an item of the batch each."""
        pieces = [own for own, _ in self._pieces[self.rank]]
        return [(item, slice(*piece)) for item in range(batch) for piece in pieces]

    def _whole(self, rank: int, batch: int) -> list[Place]:
        """Where a rank's streams lie in the whole sequence, in the same order."""
        pieces = [whole for _, whole in self._pieces[rank]]
        return [(item, slice(*piece)) for item in range(batch) for piece in pieces]

    def everywhere(self, symbols: Symbols, num_heads: int) -> Symbols:
        """S_c of all heads, the same bits on every rank; S_s visits nothing, and is not to be read.

        Args:
            symbols: of this rank's heads.
            num_heads: H.
        """
        counts = [len(self.heads(num_heads, rank)) for rank in range(self.size)]
        q_bits = torch.cat(self.ranks.gather_rows(symbols.q_bits, counts), 1)
        shape = (*q_bits.shape[:2], *symbols.kv_bits.shape[2:])
        unread = symbols.kv_bits.new_zeros(1, 1, 1, shape[-1]).expand(shape)
        return Symbols(q_bits, unread, symbols.grid)

    def places(self, start: int, count: int) -> list[tuple[slice, int]]:
        """Where rows of this rank lie in the whole sequence: see :meth:`Layout.places`."""
        return self.layout.places(self.rank, start, count)

    def enter(self, x: Tensor, name: str | None = None, dim: int = 1) -> Tensor:
        """This rank's rows of the whole.

        Args:
            x: with the rows of one stream, or of the whole sequence, along ``dim``.
            name: of the stream; ``None`` for the whole sequence.
            dim: which one.
        """
        if name is not None:
            lengths = self.layout.lengths[self.names.index(name)]
            start = sum(lengths[: self.rank])
            return x.narrow(dim, start, lengths[self.rank])
        pieces = [places for _, places in self._pieces[self.rank]]
        parts = [x.narrow(dim, start, stop - start) for start, stop in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def rows_of(self, name: str | None, *tables: Tensor) -> tuple[Tensor, ...]:
        """:meth:`enter` for RoPE tables, ``[R, D / 2]`` or ``[B or 1, R, H or 1, D / 2]`` each."""
        return tuple(self.enter(table, name, table.ndim // 4) for table in tables)

    def leave(self, x: Tensor, name: str | None = None) -> Tensor:
        """All rows of a stream ``[B, R, ...]``, the same bits on every rank.

        Args:
            x: this rank's rows, or those of all streams in their order.
            name: of the stream; ``None`` for all of them.
        """
        if name is not None and x.shape[1] == self.lengths.get(name):
            counts = self.layout.lengths[self.names.index(name)]
            return torch.cat(self.ranks.gather_rows(x, counts), 1)
        parts = self.ranks.gather_rows(x, self._counts)
        ends = [list(accumulate((n[rank] for n in self.layout.lengths), initial=0))
                for rank in range(self.size)]  # fmt: skip
        return torch.cat(
            [
                parts[rank][:, ends[rank][number] : ends[rank][number + 1]]
                for number in range(len(self.layout.lengths))
                for rank in range(self.size)
            ],
            1,
        )
