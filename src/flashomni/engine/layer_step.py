"""What a layer knows and chooses in one step, beside its projections and its attention.

Its grid, whether it caches tiles or is cached whole, its symbols, and the record of its FLOPs.

Letters in shapes: B batch, S tokens, R rows of one stream, H num_heads, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from flashomni.engine.layer_ranks import LayerRanks
from flashomni.engine.linear import Projection, linear_flops
from flashomni.engine.schedules import StepKind
from flashomni.engine.sparse_settings import SparseStep
from flashomni.engine.state.cache import Fraction, LayerCache
from flashomni.engine.state.columns import Columns, every_column
from flashomni.engine.step_plan import StepPlan
from flashomni.engine.symbols_file import attention_name
from flashomni.engine.trace import LayerRecord
from flashomni.policies import AttentionSite
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import live_share, measure

T = TypeVar("T")


class LayerStep(LayerRanks):
    """One layer in one step, without the engine's three calls (see :class:`LayerRun`).

    Attributes:
        grid: blocks of the sequence, after :meth:`begin`.
        kind: what the step does in this layer.
        recipe: what is run.
        geometry: of the vision tokens; what its ``place(start, count)`` gives is for :meth:`begin`.
        inputs: the model's arguments by name, for their sizes: what a block is not told.
    """

    grid: Grid
    _first: LayerStep | None = None

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
        self._shard = plan.shard
        self.inputs: Mapping[str, Any] = plan.inputs
        record.kind = self.kind.value
        cache.ops = record.ops  # filled while the block runs

    def second(self, stream: str) -> Self:
        """The run of another attention in the same block: with a sequence and tiles of its own.

        It begins after this one, which decides for both whether the block is cached whole, and
        gives the report its densities.

        Args:
            stream: the block's tokens that it is over.
        """
        cache, record = self._cache.second(), self._record.second()
        other = type(self)(self.index, cache, self._plan, record, self._shared, self._cacheable)
        other._first = self
        if self._shard is not None:
            other._shard = self._shard.only(stream)
        return other

    def begin(
        self,
        seqlen: int,
        *,
        text: tuple[int, int] = (0, 0),
        kv_len: Tensor | None = None,
        **place: Any,
    ) -> Grid:
        """Say what the layer's sequence is, before anything else; also without attention of ours.

        Args:
            seqlen: tokens of the sequence that the block has; or :meth:`total` of them, and all
                else of the whole sequence too.
            text: token range of the text, at the start or at the end.
            kv_len: int32 ``[B]``, valid keys of each batch item where padding sits at the end; one
                tensor for all layers of a call (see :meth:`shared`).
            place: ``shape``, ``spans`` and ``order`` of :class:`Grid`, where they are known.

        Returns:
            The grid of the sequence.
        """
        self.rows = seqlen
        seqlen, text, kv_len, place = self._whole(seqlen, text, kv_len, place)
        blocks = self.recipe.sparse.block_m, self.recipe.sparse.block_n
        sizes = (seqlen, text, blocks, tuple(place.items()))
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

    @functools.cached_property
    def _sparse(self) -> SparseStep:
        """What the step does with columns; asked first when it is known whether D has room."""
        return self._plan.sparse

    @property
    def _stores(self) -> bool:
        return self._cacheable and self._plan.stores

    def _decide_degradation(self, known: float | None) -> None:
        """S_q: cache the layer whole if little of it is computed; look again at each Update."""
        plan, threshold = self._plan, self.recipe.sparse.degrade_below
        if self._first is None:
            self._cache.degrade(known, plan.step, threshold, plan.hopeful)
            return
        self._cache.degraded = self._first._cache.degraded
        if self._cache.degraded:
            self._cache.forget_heads()

    @property
    def _caches_heads(self) -> bool:
        """Whether this layer has cached tiles of its own (not a whole cached layer)."""
        return self._cacheable and self._policy.caches and not self._cache.degraded

    def count(self, op: str, modules: Iterable[Projection], rows: int) -> None:
        """Record the FLOPs of Linears that the adapter runs itself, for ``rows`` tokens."""
        self.add(op, sum(linear_flops(module, rows) for module in modules))

    def add(self, op: str, flops: int) -> None:
        """Record FLOPs that were executed."""
        self._record.add(op, flops)

    def _site(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, guide: Tensor | None
    ) -> AttentionSite:
        """What the policy is shown."""
        plan, heads = self._plan, self._heads(q)
        if guide is not None:
            guide = guide[:, heads.start : heads.stop]
        return AttentionSite(
            q=q, k=k, v=v, grid=self.grid, layer=self.index, num_layers=plan.num_layers,
            heads=heads, step=plan.step, num_steps=plan.num_steps,
            progress=plan.progress, branch=plan.branch, softmax_scale=scale, guide=guide,
            backend=self.backend,
        )  # fmt: skip

    def _choose(self, site: AttentionSite) -> None:
        """Choose what this computed step chooses: columns, and at an Update tiles."""
        cache, settings, sparse, found = self._cache, self.recipe.sparse, self._sparse, None
        is_update = self.kind is StepKind.UPDATE
        if is_update and cache.degraded and not (self._is_asked or settings.keeps_columns):
            self._forget_tiles()
            return
        needs = cache.columns is None and (sparse.skips or sparse.refreshes)
        if sparse.chooses or needs:
            found = measure(self._chosen(site), settings.min_skip, backend=self.backend)
            if settings.keeps_columns:
                columns = Columns.of(found[0], text_rows=sparse.carries)
                columns.q_bits = None if self._plan.symbols is None else found[0].q_bits
                cache.keep(columns)
                if sparse.carries:  # it was of another sparse O
                    cache.history = None
        if not is_update:
            return
        if settings.keeps_columns:
            found = measure(self._joined(site, found), backend=self.backend)
        assert found is not None
        symbols, q_density, kv_density = found
        is_asked = self._is_asked or not cache.degraded
        cache.everywhere = self._everywhere(symbols) if is_asked else None
        if self._is_asked:
            self._send(q_density, cache.everywhere)
        if cache.degraded:
            self._forget_tiles()
            return
        cache.live_shares.clear()
        cache.symbols, cache.q_density, cache.kv_density = symbols, q_density, kv_density

    def _forget_tiles(self) -> None:
        """The layer is cached whole: no tile of it will be asked for."""
        self._cache.symbols = self._cache.everywhere = None
        self._cache.live_shares.clear()

    def _chosen(self, site: AttentionSite) -> Symbols:
        """Symbols of the policy, or of a file."""
        plan = self._plan
        if plan.symbols is not None:
            name = attention_name(self._record.name, int(self._first is not None))
            return plan.symbols.of(plan.branch, name, self.grid, site.q)
        progress = (site.step + 1) / site.num_steps
        return self.recipe.sparse.policy_at(self._policy, progress)(site)

    def _joined(self, site: AttentionSite, found: tuple[Symbols, Any, Any] | None) -> Symbols:
        """Tiles, chosen at every Update, and the columns that are kept; before a choice all."""
        columns = self._cache.columns
        if columns is not None and (columns.q_bits is not None or self._known == 1.0):
            return columns.symbols if columns.q_bits is None else columns.under(columns.q_bits)
        tiles = self._policy(site) if found is None else found[0]
        return every_column(tiles) if columns is None else columns.under(tiles.q_bits)

    @property
    def _is_asked(self) -> bool:
        """Whether S_q depends on what is measured here."""
        return self.recipe.sparse.degrade_below > 0 and self._known is None and self._first is None

    def _everywhere(self, symbols: Symbols) -> Symbols | None:
        """S_c of all heads, where these are of a rank's own."""
        return self._all_heads(symbols) if self._policy.caches else None

    def _send(self, q_density: Tensor, everywhere: Symbols | None) -> None:
        """Keep the computed fraction for the host; that of all heads, so that ranks decide alike.

        Args:
            q_density: of the heads here.
            everywhere: S_c of all of them, where those are not all.
        """
        if everywhere is not None:
            q_density = measure(everywhere, backend=self.backend)[1]
        self._cache.fraction = Fraction(q_density)
        self._cache.measured = self._plan.step

    def _own_symbols(self) -> Symbols:
        """Of the heads that attention has here."""
        symbols = self._cache.symbols
        assert symbols is not None, "a Dispatch step without an Update"
        return symbols

    def _symbols(self) -> Symbols:
        """Of all heads: S_c, by which projections go."""
        everywhere = self._cache.everywhere
        return self._own_symbols() if everywhere is None else everywhere

    def _live_share(self, row_offset: int, rows: int) -> Tensor:
        """Share of a stream's (token, head) pairs that are computed: fp32 scalar on the device."""
        shares = self._cache.live_shares
        if (row_offset, rows) not in shares:
            shares[row_offset, rows] = live_share(
                self._symbols(), rows, row_offset, backend=self.backend
            )
        return shares[row_offset, rows]


def _identity(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
