"""A call of a model whose sequence is spread over ranks: rows outside of attention, heads inside.

Outside of attention a rank holds its own rows of each stream, with all heads; inside it holds all
rows in the model's own order, of its own heads (DeepSpeed Ulysses, arXiv 2309.14509). The copy that
changes the layout has to be made in any case: it sorts rows as well.

Letters in shapes: B batch, R rows of this rank, S rows of the whole sequence, H num_heads,
h = H / P heads of a rank, D head_dim, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni.parallel.layout import Layout
from flashomni.parallel.ranks import Ranks
from flashomni.symbols import Symbols


class Shard:
    """How a call's sequence is shared out.

    Args:
        ranks: who shares it.
        layout: of the sequence.
        names: of its streams.

    Attributes:
        lengths: rows that this rank has of each stream.
    """

    def __init__(self, ranks: Ranks, layout: Layout, names: Sequence[str] = ()) -> None:
        self.ranks, self.layout = ranks, layout
        self.rank, self.size = ranks.rank, ranks.size
        mine = (lengths[ranks.rank] for lengths in layout.lengths)
        self.lengths = dict(zip(names, mine, strict=False))
        self._counts = [layout.rows(rank) for rank in range(self.size)]

    def heads(self, num_heads: int) -> range:
        """The heads that this rank attends.

        Args:
            num_heads: H.

        Raises:
            NotImplementedError: they do not divide.
        """
        share, rest = divmod(num_heads, self.size)
        if rest:
            raise NotImplementedError(
                f"{num_heads} heads cannot be shared out evenly among {self.size} ranks: take an "
                "ulysses_degree that divides them"
            )
        return range(self.rank * share, (self.rank + 1) * share)

    def to_heads(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """``[B, R, H, D]`` -> ``[B, S, h, D]``, each; all are under way at once."""
        started = []
        for x in rows:
            share = len(self.heads(x.shape[2]))
            send = x.unflatten(2, (self.size, share)).permute(2, 1, 0, 3, 4).flatten(0, 1)
            started.append(
                self.ranks.exchange(send.contiguous(), self._counts, [x.shape[1]] * self.size)
            )
        return tuple(self._sorted(*each) for each in started)

    def _sorted(self, received: Tensor, work: object) -> Tensor:
        """Rows of all ranks in the order of the sequence."""
        work.wait()  # type: ignore[attr-defined]  # a Work, which torch types differently by release
        batch = received.shape[1]
        out, at = received.new_empty(batch, self.layout.seqlen, *received.shape[2:]), 0
        for rank, count in enumerate(self._counts):
            for (first, last), (start, stop) in self.layout.pieces(rank):
                out[:, start:stop] = received[at + first : at + last].transpose(0, 1)
            at += count
        return out

    def to_rows(self, o: Tensor) -> Tensor:
        """``[B, S, h, D]`` -> ``[B, R, H, D]``."""
        runs = [
            o[:, start:stop].transpose(0, 1)
            for rank in range(self.size)
            for _, (start, stop) in self.layout.pieces(rank)
        ]
        rows = self._counts[self.rank]
        received, work = self.ranks.exchange(torch.cat(runs), [rows] * self.size, self._counts)
        work.wait()
        return received.unflatten(0, (self.size, rows)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def everywhere(self, symbols: Symbols) -> Symbols:
        """S_c of all heads, the same bits on every rank; S_s visits nothing, and is not to be read.

        Args:
            symbols: of this rank's heads.
        """
        q_bits = torch.cat(self.ranks.gather(symbols.q_bits), 1)
        shape = (*q_bits.shape[:2], *symbols.kv_bits.shape[2:])
        unread = symbols.kv_bits.new_zeros(1, 1, 1, shape[-1]).expand(shape)
        return Symbols(q_bits, unread, symbols.grid)

    def places(self, start: int, count: int) -> list[tuple[slice, int]]:
        """Where rows of this rank lie in the whole sequence: see :meth:`Layout.places`."""
        return self.layout.places(self.rank, start, count)
