"""Attention in a step that computes a layer: dense, sparse or a refresh; and what is carried.

In a refresh attention runs over the live blocks and over the rest, which together are dense, and
what sparse attention misses is kept: D = dense - sparse. Everything behind works on the *sparse* O
(the histories too), and D is added behind the output projection, of all heads at once, in every
step that computes the layer or dispatches in it. So nothing depends on which tiles are cached, and
D is neither counted twice nor lost when that changes. Where the projection has to be called, D is
added to O in front of it, after the histories have had theirs.

Letters in shapes: B batch, S tokens, R rows of one stream, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.layer_step import LayerStep
from flashomni.engine.linear import Weights
from flashomni.engine.state.cache import History
from flashomni.engine.state.columns import Carry, every_column
from flashomni.engine.state.storage import parts
from flashomni.kernels import Summary, refresh, sparse_attention, summarise
from flashomni.kernels.elementwise.op import weighted_sum
from flashomni.symbols import Symbols


class LayerCarry(LayerStep):
    """A layer that skips in computed steps, and carries what that misses.

    Attributes:
        ahead: starts the way of the next layer's D back from the host; called where that of this
            one is used up, so that no more than one lies beside the layer.
    """

    ahead: Callable[[], None] | None = None
    _difference: Tensor | None = None  # D of this step [B, S, H, D], in a refresh
    _adds: bool = False  # whether attention of this step was sparse, so that D is missing

    def _find_room(self, o: Tensor) -> None:
        """Before anything is carried: is there room for D?"""
        plan, settings = self._plan, self.recipe.sparse
        if settings.carries and plan.room is not None:
            terms = 2 if settings.carry == "extrapolate" else 1
            plan.room.find(plan.branch, o, plan.num_layers, terms, self._agreed)

    def _attend_computed(
        self, q: Tensor, k: Tensor, v: Tensor, flops: int, options: dict[str, Any]
    ) -> Tensor:
        """Attention of a full or an Update step; D is not in it yet where it is sparse."""
        cache, sparse, columns = self._cache, self._sparse, self._cache.columns
        if columns is None or not (sparse.skips or sparse.refreshes):
            self._record.add("attention", flops)
            return sparse_attention(q, k, v, **options, backend=self.backend)
        if sparse.refreshes or (sparse.carries and cache.carry is None):
            return self._refresh(q, k, v, flops, options)
        self._record.kv_density = columns.density
        self._expect_own(columns.symbols)
        self._record.add("attention", flops, columns.density + self._summary_share)
        summary = self._summary(k, v)
        return sparse_attention(
            q, k, v, columns.symbols, **options, summary=summary, backend=self.backend
        )

    def _summary(self, k: Tensor, v: Tensor) -> Summary | None:
        """What stands for skipped blocks, where the recipe wants it."""
        per_block = self.recipe.sparse.summaries
        return summarise(k, v, self.grid, per_block, backend=self.backend) if per_block else None

    @property
    def _summary_share(self) -> float:
        """What summaries cost, of dense attention."""
        grid = self.grid
        return self.recipe.sparse.summaries * grid.num_kv_blocks / grid.seqlen_kv

    def _refresh(
        self, q: Tensor, k: Tensor, v: Tensor, flops: int, options: dict[str, Any]
    ) -> Tensor:
        """Sparse attention, and D beside it."""
        cache, settings = self._cache, self.recipe.sparse
        columns = cache.columns
        assert columns is not None
        summary = self._summary(k, v)
        self._record.add("attention", flops, 1.0 + self._summary_share)
        given: dict[str, Any] = {name: options[name] for name in ("kv_len", "softmax_scale")}
        given |= {"summary": summary, "backend": self.backend}
        if settings.measure:
            given["mass"] = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        o, self._difference = refresh(q, k, v, columns.symbols, **given)
        if settings.measure:
            self._record.mass = given["mass"].mean()
        if cache.carry is None:
            order = int(settings.carry == "extrapolate")
            room = self._plan.room
            storage = None if room is None else room.places.get(self._plan.branch)
            cache.carry = Carry(columns, order, storage or self._plan.storage)
        return o

    def _expect_own(self, symbols: Symbols) -> None:
        """Attention with these columns is sparse: D will be added, of these and of no others."""
        carry = self._cache.carry
        if not self._sparse.carries or self._cache.columns is None:
            return
        if carry is None or not carry.belongs_to(symbols):
            raise RuntimeError(
                f"{self._record.name}: step {self._plan.step} is sparse with symbols for which no "
                "difference is carried: symbols that change need a refresh in the same step"
            )
        self._adds = True

    def _carried(self, value: Tensor, row_offset: int, weights: Weights | None = None) -> Tensor:
        """A stream with D, where its attention was sparse.

        Args:
            value: O ``[B, R, H, D]`` in front of the projection, or ``[B, R, N]`` behind it.
            row_offset: position of its first row in the sequence.
            weights: of the projection, behind it.
        """
        carry, step = self._cache.carry, self._plan.step
        if carry is None or (self._difference is None and not self._adds):
            return value
        projected = weights is not None
        if self._difference is not None:
            rows = self._difference[:, row_offset : row_offset + value.shape[1]]
            if weights is not None:
                rows = _projected(rows, weights.weight)
            if self.recipe.sparse.measure and carry.has(row_offset, projected):
                self._record.error = self._missed(carry.stream(row_offset, projected), rows)
            carry.put(row_offset, rows, projected, step)
            return value.add_(rows) if projected else value + rows  # O may be in a history
        total = self._sum(carry.stream(row_offset, projected), value)
        if self.ahead is not None:
            self.ahead()
        return total

    def _settle(self) -> None:
        """Attention was launched: what the layer before sent to the host is there by then."""
        if self._cache.carry is not None:
            self._cache.carry.settle()

    def _sum(self, history: History, base: Tensor) -> Tensor:
        """``base`` and D as it is carried to this step."""
        coefficients = self._plan.carried(history.times, base.dtype == torch.float16)
        return weighted_sum(history.terms(), coefficients, base, base.dtype, backend=self.backend)

    def _missed(self, history: History, rows: Tensor) -> Tensor:
        """How far the carried D is off, of the norm of the true one."""
        carried = self._sum(history, torch.zeros_like(rows)).float()
        true = rows.float()
        return (carried - true).norm() / true.norm().clamp(min=1e-30)

    @property
    def _projects_difference(self) -> int:
        """Projections of all heads beside that of O."""
        return int(self._difference is not None)

    def _dispatched(self, flops: int) -> Symbols:
        """The symbols of a Dispatch step, whose share of dense attention is recorded."""
        symbols, record = self._own_symbols(), self._record
        if self._plan.step < self.recipe.sparse.dense_steps:
            record.kv_density = 1.0
            symbols = every_column(symbols)
        else:
            self._expect_own(symbols)
        share = self._summary_share
        visited = record.kv_density + share if share else record.kv_density
        record.add("attention", flops, record.q_density * visited)
        return symbols


def _projected(rows: Tensor, weight: Tensor) -> Tensor:
    """D of all heads behind the projection, in its own memory where that has the size.

    Args:
        rows: ``[B, R, H, D]``, written over.
        weight: ``[N, H * D + E]`` of the projection.
    """
    heads = rows.flatten(2)
    weight = weight[:, : heads.shape[-1]]
    if weight.shape[0] != heads.shape[-1]:
        return torch.nn.functional.linear(heads, weight)
    for each in parts(heads):
        heads[:, each] = torch.nn.functional.linear(heads[:, each], weight)
    return heads
