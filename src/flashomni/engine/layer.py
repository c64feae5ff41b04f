"""One layer in one step: the three engine calls that an adapter makes.

An adapter runs its block in its own order and leaves three things to the engine::

    run.project_q(x, to_q, ...)     queries, only those that will be computed
    run.attend(q, k, v, ...)        attention over the live blocks
    run.project_o(o, to_out, ...)   output projection plus the forecast of cached heads

A layer that is cached whole is not run at all (see :mod:`flashomni.engine.state.span`).

Letters in shapes: B batch, S tokens, R rows of one stream, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashomni.engine.linear import (
    is_rms_norm,
    linear_flops,
    norm_eps,
    norm_heads,
    plain_weights,
    project_into,
    project_joined,
    why_not_plain,
)
from flashomni.engine.schedules import StepKind
from flashomni.engine.state.cache import Fraction, History, LayerCache
from flashomni.engine.state.storage import Kept
from flashomni.engine.step_plan import StepPlan
from flashomni.engine.trace import LayerRecord
from flashomni.kernels import (
    ForecastTerms,
    gemm_o_update,
    sparse_attention,
    sparse_gemm_o,
    sparse_gemm_q,
)
from flashomni.kernels.common.rope import Rope
from flashomni.kernels.elementwise.op import norm_rope_
from flashomni.policies import AttentionSite
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import live_share, measure

T = TypeVar("T")


class LayerRun:
    """One layer in one step. Made by the runtime, used by an adapter, thrown away.

    Attributes:
        grid: blocks of the sequence, after :meth:`begin`.
        kind: what the step does in this layer.
        recipe: what is run.
        geometry: of the vision tokens; what its ``place(start, count)`` gives is for :meth:`begin`.
    """

    grid: Grid

    def __init__(
        self,
        index: int,
        cache: LayerCache,
        plan: StepPlan,
        record: LayerRecord,
        shared: dict[Any, Any],
        cacheable: bool = True,
    ) -> None:
        self.index, self._cacheable, self.geometry = index, cacheable, plan.geometry
        self.kind = plan.kind if cacheable else StepKind.FULL
        self._cache, self._plan, self.recipe = cache, plan, plan.recipe
        self._record, self._shared, self.backend = record, shared, plan.backend
        record.kind = self.kind.value
        cache.ops = record.ops  # filled while the block runs

    def begin(
        self,
        seqlen: int,
        *,
        text: tuple[int, int] = (0, 0),
        kv_len: Tensor | None = None,
        shape: tuple[int, int, int] | None = None,
        spans: tuple[tuple[str, int, int], ...] = (),
    ) -> Grid:
        """Say what the layer's sequence is, before anything else; also without attention of ours.

        Args:
            seqlen: tokens of the sequence.
            text: token range of the text, at the start or at the end.
            kv_len: int32 ``[B]``, valid keys of each batch item where padding sits at the end; one
                tensor for all layers of a call (see :meth:`shared`).
            shape: frames, height and width of the vision tokens, where the model knows them.
            spans: further spans of text or reference tokens.

        Returns:
            The grid of the sequence.
        """
        blocks = self.recipe.sparse.block_m, self.recipe.sparse.block_n
        sizes = (seqlen, text, blocks, shape, spans)
        key = ("grid", sizes, id(kv_len))
        if key not in self._shared:
            self._shared[key] = self._plan.grids(*sizes, kv_len)
        self.grid = self._shared[key]
        self._policy = self.recipe.policy_for(self.grid)
        self._known = self._policy.known_fraction(self.grid)
        if self._stores:
            self._decide_degradation(self._known)
        if self.kind is StepKind.DISPATCH:
            cache, record = self._cache, self._record
            record.q_density, record.kv_density = cache.q_density, cache.kv_density
        return self.grid

    def shared(self, make: Callable[..., T], *inputs: Any) -> T:
        """``make(*inputs)``, once in each call of the model: for what all layers share.

        Args:
            make: a function of the inputs alone.
            inputs: what tells two uses of ``make`` apart: numbers by value, tensors by identity.
        """
        if torch.compiler.is_compiling():
            return make(*inputs)
        key = (make, *map(_identity, inputs))
        if key not in self._shared:
            # The inputs are held, so that their ids stay theirs.
            self._shared[key] = make(*inputs), inputs
        return self._shared[key][0]

    @property
    def _stores(self) -> bool:
        return self._cacheable and self._plan.stores

    def _decide_degradation(self, known: float | None) -> None:
        """S_q: cache the layer whole if little of it is computed; look again at each Update."""
        plan, threshold = self._plan, self.recipe.sparse.degrade_below
        self._cache.degrade(known, plan.step, threshold, plan.hopeful)

    @property
    def _caches_heads(self) -> bool:
        """Whether this layer has cached tiles of its own (not a whole cached layer)."""
        return self._cacheable and self._policy.caches and not self._cache.degraded

    def count(self, op: str, modules: Iterable[nn.Module], rows: int) -> None:
        """Record the FLOPs of Linears that the adapter runs itself, for ``rows`` tokens."""
        self.add(op, sum(linear_flops(module, rows) for module in modules))

    def add(self, op: str, flops: int) -> None:
        """Record FLOPs that were executed."""
        self._record.add(op, flops)

    def project_q(
        self,
        x: Tensor,
        linear: nn.Module,
        out: Tensor,
        *,
        norm: nn.Module | None,
        rope: Rope | None,
        row_offset: int,
    ) -> None:
        """Queries of one stream, after norm and RoPE, into ``out``.

        Args:
            x: ``[B, R, K]``.
            linear: the projection; read directly only if it is plain (see ``linear.py``).
            out: ``[B, R, H, D]``; cached tiles are not written on Dispatch steps.
            norm: RMSNorm over head_dim, or ``None``.
            rope: ``(cos, sin)`` each fp32 ``[R, D / 2]``, or ``None``.
            row_offset: position of ``x[:, 0]`` in the sequence.
        """
        batch, rows, features = x.shape
        num_heads, head_dim = out.shape[2:]
        flops = 2 * batch * rows * features * num_heads * head_dim
        weights = plain_weights(linear, x)
        is_text = self.grid.is_text(row_offset, row_offset + rows)  # never cached
        sparse = self.kind is StepKind.DISPATCH and self._caches_heads and not is_text
        if sparse and weights is not None and is_rms_norm(norm, head_dim):
            self._record.add("gemm_q", flops, self._live_share(row_offset, rows))
            sparse_gemm_q(
                x,
                weights.weight,
                weights.bias,
                self._symbols(),
                row_offset=row_offset,
                norm_weight=getattr(norm, "weight", None),
                norm_eps=None if norm is None else norm_eps(norm, x.dtype),
                rope=rope,
                out=out,
                backend=self.backend,
            )
            return
        if sparse and weights is None:
            self._record.note = f"projections ran dense: {why_not_plain(linear, x)}"
        self._record.add("gemm_q", flops)
        self.project(x, linear, out, norm=norm, rope=rope)

    def project(
        self,
        x: Tensor,
        linear: nn.Module,
        out: Tensor,
        *,
        norm: nn.Module | None = None,
        rope: Rope | None = None,
    ) -> None:
        """Like :meth:`project_q` for all heads of all tokens, uncounted: keys and values."""
        project_into(linear, x, out)
        if norm is not None and not is_rms_norm(norm, out.shape[-1]):
            out.copy_(norm_heads(norm, out))
            norm = None
        eps = None if norm is None else norm_eps(norm, x.dtype)
        norm_rope_(out, getattr(norm, "weight", None), eps, rope, backend=self.backend)

    def can_attend(self, q: Tensor) -> bool:
        """Whether attention of this shape can run here: a Dispatch step needs an Update of it."""
        cache, is_dispatch = self._cache, self.kind is StepKind.DISPATCH
        return not is_dispatch or (cache.symbols is not None and cache.attended == q.shape)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out_projection: nn.Module | None,
        *,
        softmax_scale: float | None = None,
        guide: Tensor | None = None,
    ) -> Tensor:
        """Attention of the whole sequence; on an Update step also the choice of symbols.

        Args:
            q: ``[B, S, H, D]``; cached tiles may be undefined on Dispatch steps.
            k: ``[B, S, H, D]``, after norm and RoPE.
            v: ``[B, S, H, D]``.
            out_projection: what :meth:`project_o` will be called with; ``None`` where the model
                reads O itself.
            softmax_scale: of the scores, ``D ** -0.5`` by default.
            guide: map of cross-attention, for the policy.

        Returns:
            ``[B, S, H, D]``. Cached tiles are undefined, or the forecast where the output
            projection has to be called as a module, or is not the engine's.
        """
        cache, kv_len = self._cache, self.grid.kv_len
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        redone = self._plan.redone[self.index] if self._plan.redone else None
        options: dict[str, Any] = {"kv_len": kv_len, "softmax_scale": scale, "redone": redone}
        flops = 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
        if self.kind is not StepKind.DISPATCH:
            self._record.add("attention", flops)
            o = sparse_attention(q, k, v, **options, backend=self.backend)
            cache.attended = q.shape
            if self.kind is StepKind.UPDATE:
                self._choose_symbols(self._site(q, k, v, scale, guide))
            elif self._plan.probes and self._cacheable:
                symbols = self._policy(self._site(q, k, v, scale, guide))
                self._send(measure(symbols, backend=self.backend)[1])
            if self._stores and self._caches_heads:
                plain = None if out_projection is None else plain_weights(out_projection, q)
                cache.projected = plain is not None
                if out_projection is None:
                    self._push_history(o, 0)
            return o
        self._record.add("attention", flops, self._record.q_density * self._record.kv_density)
        forecast = None
        if self._caches_heads and not cache.projected:
            assert cache.history is not None
            scales = self._plan.coefficients(cache.history.times, q.dtype == torch.float16)
            forecast = ForecastTerms(cache.history.terms(), scales, cache.rows[0])
        return sparse_attention(
            q, k, v, self._symbols(), **options, forecast=forecast, backend=self.backend
        )

    def _site(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, guide: Tensor | None
    ) -> AttentionSite:
        """What the policy is shown."""
        plan = self._plan
        return AttentionSite(
            q=q, k=k, v=v, grid=self.grid, layer=self.index, num_layers=plan.num_layers,
            heads=range(q.shape[2]), step=plan.step, num_steps=plan.num_steps,
            progress=plan.progress, branch=plan.branch, softmax_scale=scale, guide=guide,
            backend=self.backend,
        )  # fmt: skip

    def _choose_symbols(self, site: AttentionSite) -> None:
        cache, min_skip = self._cache, self.recipe.sparse.min_skip
        symbols, q_density, kv_density = measure(self._policy(site), min_skip, backend=self.backend)
        self._send(q_density)
        cache.live_shares.clear()
        if cache.degraded:  # no tile of it will be asked for
            cache.symbols = None
            return
        cache.symbols, cache.q_density, cache.kv_density = symbols, q_density, kv_density

    def _send(self, q_density: Tensor) -> None:
        """Keep the computed fraction for the host, where S_q depends on it."""
        if self.recipe.sparse.degrade_below > 0 and self._known is None:
            self._cache.fraction = Fraction(q_density)
            self._cache.measured = self._plan.step

    def _symbols(self) -> Symbols:
        symbols = self._cache.symbols
        assert symbols is not None, "a Dispatch step without an Update"
        return symbols

    def _live_share(self, row_offset: int, rows: int) -> Tensor:
        """Share of a stream's (token, head) pairs that are computed: fp32 scalar on the device."""
        shares = self._cache.live_shares
        if (row_offset, rows) not in shares:
            shares[row_offset, rows] = live_share(
                self._symbols(), rows, row_offset, backend=self.backend
            )
        return shares[row_offset, rows]

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
                # 1 + (count - 1) * (1 - live), in one launch.
                count, live = len(terms), self._live_share(row_offset, o.shape[1])
                share = torch.rsub(live, count, alpha=count - 1)
                self._record.add("gemm_o", flops, share)
                y, bias_terms = gemm_o_update(
                    terms,
                    *weights,
                    self._symbols(),
                    always=always,
                    row_offset=row_offset,
                    backend=self.backend,
                )
                if cache.bias_terms is None:
                    cache.bias_terms = Kept(self._plan.storage)
                cache.bias_terms.put(bias_terms)
                assert cache.history is not None
                cache.bias_times = cache.history.times
                return y
        elif self.kind is StepKind.DISPATCH and self._caches_heads and cache.projected:
            if weights is None or cache.bias_terms is None:
                raise RuntimeError(
                    f"{self._record.name}: the output projection changed within a generation "
                    f"({why_not_plain(linear, o)}); load or remove adapters between generations"
                )
            self._record.add("gemm_o", flops, self._live_share(row_offset, o.shape[1]))
            bias_terms, is_half = cache.bias_terms.get(), o.dtype == torch.float16
            return sparse_gemm_o(
                o,
                *weights,
                self._symbols(),
                bias_terms,
                self._plan.coefficients(cache.bias_times, is_half)[: len(bias_terms)],
                always=always,
                row_offset=row_offset,
                backend=self.backend,
            )
        self._record.add("gemm_o", flops)
        return project_joined(linear, o, always)

    def _push_history(self, o: Tensor, row_offset: int) -> list[Tensor]:
        """Add O to the history; return its terms so far."""
        cache, order = self._cache, self.recipe.forecast.order
        # Projected terms are made now; only what the next differences need has to be kept.
        keep = order if cache.projected else order + 1
        if cache.history is None or cache.history.keep != keep:
            cache.history = History(order, keep, self._plan.storage, halved=True)
        cache.rows = (row_offset, row_offset + o.shape[1])
        return cache.history.push(o, self._plan.step)


def _identity(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
