"""Where the rows of each rank lie in the whole sequence.

The whole sequence has the model's own order (text, then vision, say); a rank has its share of each
stream, in the same order. So blocks, text ranges and symbols are those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """How a sequence of several streams is shared out.

    Args:
        lengths: ``lengths[stream][rank]`` rows, streams in the order of the sequence.
    """

    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def split(cls, totals: Sequence[int], size: int) -> Layout:
        """Each stream in ``size`` parts, the first ones a row longer where it does not divide.

        Args:
            totals: rows of each stream.
            size: ranks.
        """
        return cls(
            tuple(
                tuple(total // size + (r < total % size) for r in range(size)) for total in totals
            )
        )

    @property
    def seqlen(self) -> int:
        """Rows of the whole sequence."""
        return sum(map(sum, self.lengths))

    def rows(self, rank: int) -> int:
        """Rows that a rank holds."""
        return sum(lengths[rank] for lengths in self.lengths)

    def spans(self) -> list[Span]:
        """Each stream in the whole sequence."""
        stops = list(accumulate(map(sum, self.lengths)))
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def pieces(self, rank: int) -> list[tuple[Span, Span]]:
        """Each stream of a rank: its rows there, and in the whole sequence."""
        found, at = [], 0
        for lengths, (start, _) in zip(self.lengths, self.spans(), strict=True):
            rows, place = lengths[rank], start + sum(lengths[:rank])
            found.append(((at, at + rows), (place, place + rows)))
            at += rows
        return found

    def places(self, rank: int, start: int, count: int) -> list[tuple[slice, int]]:
        """Where rows ``start`` to ``start + count`` of a rank lie.

        Returns:
            Runs of them: which of the ``count`` rows, and the place of the first in the whole.
        """
        found, stop = [], start + count
        for (first, last), (place, _) in self.pieces(rank):
            low, high = max(first, start), min(last, stop)
            if low < high:
                found.append((slice(low - start, high - start), place + low - first))
        return found

    def whole(self, rank: int, seqlen: int, text: Span) -> tuple[Span, Span]:
        """Text and the other stream of the whole sequence, of what a rank takes for its own.

        Args:
            rank: whose.
            seqlen: rows that a block has there.
            text: which of them are text; empty where none are.

        Raises:
            RuntimeError: the rank should have other rows.
        """
        pieces, spans = self.pieces(rank), self.spans()
        if seqlen == self.rows(rank):
            if text[0] == text[1] and len(pieces) == 1:
                return (0, 0), spans[0]
            for number, (own, _) in enumerate(pieces):
                if own == text and len(pieces) == 2:
                    return spans[number], spans[1 - number]
        raise RuntimeError(
            f"rank {rank} has a sequence of {seqlen} rows with text in {text}, but its share of "
            f"the model's arguments are the rows {[own for own, _ in pieces]}"
        )
