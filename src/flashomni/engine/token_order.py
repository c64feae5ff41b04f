"""The order in which the blocks of a model get its vision tokens, and the way there and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols.order import Shape, permutation, to_device


class TokenOrder:
    """A permutation of the vision stream: in front of the first block, and back behind the last.

    Two of the same order and shapes are equal, wherever they are.

    Args:
        order: ``tile`` or ``hilbert``; see :func:`flashomni.symbols.order.permutation`.
        shapes: ``(T, H, W)`` of the generated tokens, then of the reference images that are known:
            each is ordered by itself.
        references: tokens behind the generated ones.
        device: of the tokens.
    """

    def __init__(
        self, order: str, shapes: tuple[Shape, ...], references: int, device: torch.device
    ) -> None:
        self.order, self._shapes = order, shapes
        self.count = math.prod(shapes[0]) + references
        there, back = _both_ways(order, shapes, self.count)
        self._there, self._back = to_device(there, device), to_device(back, device)
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenOrder) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, tuple[Shape, ...], int]:
        return self.order, self._shapes, self.count

    def enter(self, x: Tensor, dim: int = 1, start: int = 0) -> Tensor:
        """Tokens in raster order -> in this order.

        Args:
            x: with the vision tokens from ``start`` on along ``dim``; the others stay.
            dim: which one.
            start: where they begin.

        Raises:
            ValueError: there are fewer tokens.
        """
        return self._taken(x, self._there, dim, start)

    def leave(self, x: Tensor, vision: str = "last") -> Tensor:
        """The inverse of :meth:`enter`: the call is over, and what :meth:`once` kept is dropped.

        Args:
            x: ``[B, R, K]``, the vision tokens, and others maybe.
            vision: whether they come ``first`` or ``last`` then.
        """
        self._made.clear()
        start = 0 if vision == "first" else x.shape[1] - self.count
        return self._taken(x, self._back, 1, start)

    def once(self, x: Tensor) -> Tensor:
        """:meth:`enter`, done once in a call for what all blocks get."""
        if torch.compiler.is_compiling():
            return self.enter(x)
        if id(x) not in self._made:
            self._made[id(x)] = x, self.enter(x)  # x is held, so that its id stays its own
        return self._made[id(x)][1]

    def tables(self, start: int, *tables: Tensor) -> tuple[Tensor, ...]:
        """RoPE tables, ``[R, D / 2]`` or ``[B, R, H, D / 2]``; vision tokens begin at ``start``."""
        return tuple(self.enter(table, table.ndim // 4, start) for table in tables)

    def residuals(self, name: str, given: Any) -> Any:
        """What a model adds to its tokens between blocks, ``[B, R, K]`` each, in this order.

        Args:
            name: of the model's argument.
            given: a list of tensors, or ``None``.

        Raises:
            NotImplementedError: one has neither an entry for each token nor one for all.
        """
        if given is None:
            return None
        for each in given:
            if each.ndim != 3 or each.shape[1] not in (1, self.count):
                raise NotImplementedError(
                    f"token_order {self.order!r}: {name} must hold [B, {self.count}, K], an entry "
                    f"for each vision token, got {list(each.shape)}; take token_order 'raster'"
                )
        return [each if each.shape[1] == 1 else self.once(each) for each in given]

    def _taken(self, x: Tensor, index: Tensor, dim: int, start: int) -> Tensor:
        if not 0 <= start <= x.shape[dim] - self.count:
            raise ValueError(
                f"x must have {self.count} vision tokens from {start} on along dim {dim}, "
                f"got {list(x.shape)}"
            )
        stop = start + self.count
        tokens = x.narrow(dim, start, self.count).index_select(dim, index)
        if self.count == x.shape[dim]:
            return tokens
        rest = x.narrow(dim, stop, x.shape[dim] - stop)
        return torch.cat([x.narrow(dim, 0, start), tokens, rest], dim)


@functools.lru_cache(maxsize=32)
def _both_ways(order: str, shapes: Sequence[Shape], count: int) -> tuple[Tensor, Tensor]:
    """The permutation of all tokens and its inverse: int64 ``[count]`` on the CPU."""
    parts, start = [], 0
    for shape in shapes:
        parts.append(permutation(shape, order) + start)
        start += math.prod(shape)
    there = torch.cat([*parts, torch.arange(start, count)])
    return there, there.argsort()
