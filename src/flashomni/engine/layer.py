"""One layer in one step: the three engine calls that an adapter makes.

An adapter runs its block in its own order and leaves three things to the engine::

    run.project_q(x, to_q, ...)     queries, only those that will be computed
    run.attend(q, k, v, ...)        attention over the live blocks
    run.project_o(o, to_out, ...)   output projection plus the forecast of cached heads

A layer that is cached whole is not run at all (see :mod:`flashomni.engine.state.span`).

Letters in shapes: B batch, S tokens, R rows of one stream, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine.layer_carry import LayerCarry
from flashomni.engine.linear import (
    Projection,
    Weights,
    is_rms_norm,
    norm_eps,
    norm_heads,
    plain_weights,
    project_into,
    project_joined,
    why_not_plain,
)
from flashomni.engine.schedules import StepKind
from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Kept
from flashomni.kernels import (
    ForecastTerms,
    gemm_o_update,
    sparse_attention,
    sparse_gemm_o,
    sparse_gemm_q,
)
from flashomni.kernels.common.rope import Rope
from flashomni.kernels.elementwise.op import norm_rope_
from flashomni.parallel import Sent
from flashomni.symbols.choice.op import measure


class LayerRun(LayerCarry):
    """One layer in one step. Made by the runtime, used by an adapter, thrown away."""

    def project_q(
        self,
        x: Tensor,
        linear: Projection,
        out: Tensor,
        *,
        norm: nn.Module | None,
        rope: Rope | None,
        row_offset: int,
        rope_layout: str = "interleaved",
    ) -> None:
        """Queries of one stream, after norm and RoPE, into ``out``.

        Args:
            x: ``[B, R, K]``.
            linear: the projection; read directly only if it is plain (see ``linear.py``).
            out: ``[B, R, H, D]``; cached tiles are not written on Dispatch steps.
            norm: RMSNorm over head_dim, any norm over all heads, or ``None``.
            rope: ``(cos, sin)``, see :func:`norm_rope_`, or ``None``.
            row_offset: position of ``x[:, 0]`` in the sequence.
            rope_layout: ``"interleaved"`` or ``"half"``.
        """
        what: dict[str, Any] = {"norm": norm, "rope_layout": rope_layout}
        if self._shard is None or self.kind is not StepKind.DISPATCH:
            self._project_q(x, linear, out, rope=rope, row_offset=row_offset, **what)
            return
        for rows, place in self._shard.places(row_offset, x.shape[1]):
            part = rope and (_rows_of(rope[0], rows), _rows_of(rope[1], rows))
            self._project_q(x[:, rows], linear, out[:, rows], rope=part, row_offset=place, **what)

    def _project_q(
        self,
        x: Tensor,
        linear: Projection,
        out: Tensor,
        *,
        norm: nn.Module | None,
        rope: Rope | None,
        row_offset: int,
        rope_layout: str,
    ) -> None:
        """:meth:`project_q` of tokens that are neighbours in the whole sequence."""
        batch, rows, features = x.shape
        num_heads, head_dim = out.shape[2:]
        flops = 2 * batch * rows * features * num_heads * head_dim
        weights = plain_weights(linear, x)
        is_text = self.grid.is_text(row_offset, row_offset + rows)  # never cached
        sparse = self.kind is StepKind.DISPATCH and self._caches_heads and not is_text
        if sparse and weights is not None and is_rms_norm(norm, head_dim):
            self._record.add("gemm_q", flops, self._live_share(row_offset, rows))
            shared = rope is None or rope[0].ndim == 2  # by all items and heads
            sparse_gemm_q(
                x,
                weights.weight,
                weights.bias,
                self._symbols(),
                row_offset=row_offset,
                norm_weight=getattr(norm, "weight", None),
                norm_eps=None if norm is None else norm_eps(norm, x.dtype),
                rope=rope if shared else None,
                rope_layout=rope_layout,
                out=out,
                backend=self.backend,
            )
            if not shared:
                norm_rope_(out, None, None, rope, rope_layout, backend=self.backend)
            return
        if sparse and weights is None:
            self._record.note = f"projections ran dense: {why_not_plain(linear, x)}"
        self._record.add("gemm_q", flops)
        self.project(x, linear, out, norm=norm, rope=rope, rope_layout=rope_layout)

    def project(
        self,
        x: Tensor,
        linear: Projection,
        out: Tensor,
        *,
        norm: nn.Module | None = None,
        rope: Rope | None = None,
        rope_layout: str = "interleaved",
    ) -> None:
        """Like :meth:`project_q` for all heads of all tokens, uncounted: keys and values."""
        project_into(linear, x, out)
        if norm is not None and not is_rms_norm(norm, out.shape[-1]):
            out.copy_(norm_heads(norm, out))
            norm = None
        eps = None if norm is None else norm_eps(norm, x.dtype)
        weight = getattr(norm, "weight", None)
        norm_rope_(out, weight, eps, rope, rope_layout, backend=self.backend)

    def can_attend(self, q: Tensor) -> bool:
        """Whether attention of this shape can run here: a Dispatch step needs an Update of it."""
        cache, is_dispatch = self._cache, self.kind is StepKind.DISPATCH
        return not is_dispatch or (cache.symbols is not None and cache.attended == q.shape)

    def attend(
        self,
        q: Tensor | Sent,
        k: Tensor | Sent,
        v: Tensor | Sent,
        out_projection: nn.Module | None,
        *,
        softmax_scale: float | None = None,
        guide: Tensor | None = None,
        gate: Tensor | None = None,
        key_orders: Sequence[tuple[Tensor, int]] = (),
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """Attention of the whole sequence; on an Update step also the choice of symbols.

        Where the sequence is spread over ranks, S is this rank's rows: they are exchanged for rows
        of all ranks, of some heads, and O back. Nothing else in a layer communicates but the
        choice of symbols.

        Args:
            q: ``[B, S, H, D]``, or what :meth:`send` gave for it, like ``k`` and ``v``; cached
                tiles may be undefined on Dispatch steps.
            k: ``[B, S, H, D]``, after norm and RoPE.
            v: ``[B, S, H, D]``.
            out_projection: what :meth:`project_o` will be called with; ``None`` where the model
                reads O itself.
            softmax_scale: of the scores, ``D ** -0.5`` by default.
            guide: map of cross-attention, for the policy.
            gate: ``[B, S, H, D or 1]``, what O is multiplied by in front of its projection. What
                is cached is the gated O, in which the projection is linear.
            key_orders: int64 ``[B, T]`` and a position in the whole sequence each: which of the T
                keys and values from there on comes first, second, ...
            meanwhile: called once, while O is on its way back from other ranks, and not at all
                where it has no way to go: for what does not need it.

        Returns:
            ``[B, S, H, D]``, gated. Cached tiles are undefined, or the forecast where the output
            projection has to be called as a module, or is not the engine's.
        """
        cache, kv_len = self._cache, self.grid.kv_len
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        remembers = self._plan.redone and self._first is None  # of the layer's main attention
        redone = self._plan.redone[self.index] if remembers else None
        options: dict[str, Any] = {"kv_len": kv_len, "softmax_scale": scale, "redone": redone}
        self._num_heads = q.shape[2]
        v, k, q = (self._arrived(x) for x in (v, k, q))
        for order, start in key_orders:
            _sort(k, order, start)
            _sort(v, order, start)
        flops = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
        if self.kind is not StepKind.DISPATCH:
            site = self._site(q, k, v, scale, guide)
            self._find_room(q)
            self._choose(site)
            o = self._attend_computed(q, k, v, flops, options)
            self._settle()
            o = self._to_rows(o, meanwhile)
            if self._difference is not None:
                self._difference = self._to_rows(self._difference)
            o = self._gated(o, gate)
            cache.attended = q.shape
            is_probe = self.kind is StepKind.FULL and self._plan.probes and self._cacheable
            if is_probe and self._is_asked:
                symbols, q_density, _ = measure(self._policy(site), backend=self.backend)
                self._send(q_density, self._everywhere(symbols))
            if self._stores and self._caches_heads:
                plain = None if out_projection is None else plain_weights(out_projection, q)
                cache.projected = plain is not None
                if out_projection is None:
                    self._push_history(o, 0)
            return o if out_projection is not None else self._carried(o, 0)
        symbols, forecast = self._dispatched(flops), None
        options["summary"] = self._summary(k, v)
        if self._caches_heads and not cache.projected:
            assert cache.history is not None
            scales = self._plan.coefficients(cache.history.times, q.dtype == torch.float16)
            forecast = ForecastTerms(cache.history.terms(), scales, cache.rows[0])
        inside = forecast if self._shard is None else None  # else it is by rows, of all heads
        o = sparse_attention(q, k, v, symbols, **options, forecast=inside, backend=self.backend)
        o = self._to_rows(o, meanwhile)
        if inside is not forecast:
            o = self._filled(o)
        o = self._gated(o, gate, forecasts=forecast is not None)
        return o if out_projection is not None else self._carried(o, 0)

    def _filled(self, o: Tensor) -> Tensor:
        """This rank's rows of O with the forecast in the tiles that are cached."""
        history, (start, stop) = self._cache.history, self._cache.rows
        assert history is not None
        scales = self._plan.coefficients(history.times, o.dtype == torch.float16)
        forecast = history.predict(scales)
        live, part = self._live_rows(self._symbols(), o.shape[1]), o[:, start:stop]
        part.copy_(torch.where(live[:, start:stop], part, forecast))
        return o

    def _gated(self, o: Tensor, gate: Tensor | None, *, forecasts: bool = False) -> Tensor:
        """O times its gate, like what is carried of it; a forecast in O is gated already."""
        if gate is None:
            return o
        if self._difference is not None:
            self._difference = self._difference * gate
        if forecasts:
            gate = torch.where(self._live_rows(self._symbols(), o.shape[1]), gate, 1.0)
        return o * gate

    def project_o(
        self,
        o: Tensor,
        linear: nn.Module,
        *,
        row_offset: int,
        always: Tensor | None = None,
    ) -> Tensor:
        """Output projection of one stream: live heads plus the forecast of the cached ones.

        Args:
            o: ``[B, R, H, D]``, the stream's rows of what :meth:`attend` returned.
            linear: the projection ``[N, H * D + E]``.
            row_offset: position of the first row in the sequence.
            always: ``[B, R, E]`` input columns that belong to no head, or ``None``.

        Returns:
            ``[B, R, N]``.
        """
        cache = self._cache
        weights = plain_weights(linear, o)
        width = o.shape[2] * o.shape[3]
        out_features = int(linear.out_features)  # type: ignore[arg-type]  # all Linears have it
        flops = 2 * o.shape[0] * o.shape[1] * width * out_features
        if always is not None:
            self._record.add("mlp", 2 * o.shape[0] * o.shape[1] * always.shape[2] * out_features)
        if self._stores and self._caches_heads:
            terms = self._push_history(o, row_offset)
            if self.kind is StepKind.UPDATE and weights is not None:
                y, bias_terms = self._update_o(terms, weights, flops, always, row_offset)
                if cache.bias_terms is None:
                    cache.bias_terms = Kept(self._plan.storage)
                cache.bias_terms.put(bias_terms)
                assert cache.history is not None
                cache.bias_times = cache.history.times
                return self._carried(y, row_offset, weights)
        elif self.kind is StepKind.DISPATCH and self._caches_heads and cache.projected:
            if weights is None or cache.bias_terms is None:
                raise RuntimeError(
                    f"{self._record.name}: the output projection changed within a generation "
                    f"({why_not_plain(linear, o)}); load or remove adapters between generations"
                )
            y = self._dispatch_o(o, weights, flops, always, row_offset)
            return self._carried(y, row_offset, weights)
        extra = self._projects_difference if weights is not None else 0
        self._record.add("gemm_o", flops, 1.0 + extra)
        if weights is None:
            return project_joined(linear, self._carried(o, row_offset), always)
        y = project_joined(linear, o, always)
        del o, always  # D is on its way, and these are as large as five of it
        return self._carried(y, row_offset, weights)

    def _update_o(
        self,
        terms: list[Tensor],
        weights: Weights,
        flops: int,
        always: Tensor | None,
        row_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """The dense projection, and the cached heads' part of it for every term."""
        count, size, parts = len(terms), terms[0].shape[1], []
        for rows, place in self._places(row_offset, size):
            part = [term[:, rows] for term in terms]
            # 1 + (count - 1) * (1 - live), in one launch.
            live, length = self._live_share(place, part[0].shape[1]), part[0].shape[1]
            share = torch.rsub(live, count + self._projects_difference, alpha=count - 1)
            self._record.add("gemm_o", flops * length // size, share)
            parts.append(
                gemm_o_update(
                    part,
                    *weights,
                    self._symbols(),
                    always=None if always is None else always[:, rows],
                    row_offset=place,
                    backend=self.backend,
                )
            )
        if len(parts) == 1:
            return parts[0]
        return torch.cat([y for y, _ in parts], 1), torch.cat([each for _, each in parts], 2)

    def _dispatch_o(
        self, o: Tensor, weights: Weights, flops: int, always: Tensor | None, row_offset: int
    ) -> Tensor:
        """Live heads projected, and the forecast of the cached ones."""
        cache, size, parts = self._cache, o.shape[1], []
        assert cache.bias_terms is not None
        bias_terms, is_half = cache.bias_terms.get(), o.dtype == torch.float16
        coefficients = self._plan.coefficients(cache.bias_times, is_half)[: len(bias_terms)]
        for rows, place in self._places(row_offset, size):
            part = o[:, rows]
            share = self._live_share(place, part.shape[1])
            self._record.add("gemm_o", flops * part.shape[1] // size, share)
            parts.append(
                sparse_gemm_o(
                    part,
                    *weights,
                    self._symbols(),
                    bias_terms[:, :, rows],
                    coefficients,
                    always=None if always is None else always[:, rows],
                    row_offset=place,
                    backend=self.backend,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _push_history(self, o: Tensor, row_offset: int) -> list[Tensor]:
        """Add O to the history; return its terms so far."""
        cache, order = self._cache, self.recipe.forecast.order
        # Projected terms are made now; only what the next differences need has to be kept.
        keep = order if cache.projected else order + 1
        if cache.history is None or cache.history.keep != keep:
            cache.history = History(order, keep, self._plan.storage, halved=True)
        cache.rows = (row_offset, row_offset + o.shape[1])
        return cache.history.push(o, self._plan.step)


def _sort(x: Tensor, order: Tensor, start: int) -> None:
    """Rows ``[B, S, H, D]`` from ``start`` on in another order, in place."""
    part = x[:, start : start + order.shape[1]]
    part.copy_(part.take_along_dim(order[:, :, None, None], 1))


def _rows_of(table: Tensor, rows: slice) -> Tensor:
    """Rows of a RoPE table, ``[R, D / 2]`` or ``[B or 1, R, H or 1, D / 2]``."""
    return table[rows] if table.ndim == 2 else table[:, rows]
