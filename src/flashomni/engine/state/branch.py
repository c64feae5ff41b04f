"""What one conditioning branch (cond, uncond, ...) of a generation remembers between steps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.groups import Division
from flashomni.engine.sparse_settings import Marks, SparseStep
from flashomni.engine.state.cache import Fraction, LayerCache, send
from flashomni.engine.state.output import Output
from flashomni.engine.state.span import Spans
from flashomni.engine.state.storage import Storage
from flashomni.symbols import Symbols

START = object()  # caches are empty


class GroupState:
    """What the layers that share a schedule remember together.

    Attributes:
        spans: layers that are cached whole.
        computed: the steps that this branch has computed in them, in order.
        stored: the last of them that added to the histories, ``None`` before the first.
        chosen: the last of them in which columns were chosen, likewise.
        refreshed: the last of them that was a refresh, likewise.
    """

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.spans: Spans
        self.stored: int | None = None
        self.chosen: int | None = None
        self.refreshed: int | None = None

    @property
    def marks(self) -> Marks:
        """What the next step depends on."""
        behind = (
            self.computed
            if self.refreshed is None
            else [step for step in self.computed if step > self.refreshed]
        )
        return Marks(self.chosen, self.refreshed, len(behind))

    def mark(self, did: SparseStep, step: int) -> None:
        """A step is over."""
        self.chosen = step if did.chooses else self.chosen
        self.refreshed = step if did.refreshes else self.refreshed


class Branch:
    """State of all layers for one branch.

    Attributes:
        layers: what each layer remembers of its own.
        groups: what the groups of the recipe remember; one where it has none.
        output: of the whole model, where the recipe caches that.
        memory: scratch of a schedule that decides late.
        error: of the forecasts at the last Update, where the schedule asks for it.
        at: how the caches came about: what recorded or counted the call that stored last (see
            :mod:`flashomni.engine.graphs`), ``START`` while they are empty, ``None`` if unknown.
        newest: number of the newest recording that it has replayed.
        slot: the recordings that it uses.
        resets: how often everything was dropped.
        chosen: the symbols that were dropped last, where they outlive an Update (see
            :meth:`symbols`).
    """

    def __init__(self, division: Division, backend: str | None = None) -> None:
        self.division, self._backend = division, backend
        self.slot: Any = None
        self.newest = self.resets = 0
        self.layers: list[LayerCache] = []
        self.chosen: dict[tuple[int, int], Symbols] = {}
        self.groups = [GroupState() for _ in division.recipes]
        self.memory: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Drop everything that is kept; the steps that were computed stay known."""
        recipes = self.division.recipes
        if any(recipe.sparse.keeps_columns for recipe in recipes):
            self.chosen = self.symbols()
        kept = Storage(recipes[0].storage.history_dtype, backend=self._backend)
        self.layers = [LayerCache() for _ in self.division.of]
        for group, recipe in zip(self.groups, recipes, strict=True):
            group.spans = Spans(recipe.forecast.layer_order, kept)
            group.stored = group.chosen = group.refreshed = None
        self.output = Output(recipes[0].forecast.layer_order, kept)
        self.error: Fraction | None = None
        self.at, self.resets = START, self.resets + 1
        self._signatures: dict[Hashable, tuple] = {}

    def symbols(self) -> dict[tuple[int, int], Symbols]:
        """What was chosen last, by the number of the layer and of its attention."""
        caches = {(i, 0): cache for i, cache in enumerate(self.layers)}
        caches |= {(i, 1): cache.beside for (i, _), cache in caches.items() if cache.beside}
        found = {key: cache.chosen for key, cache in caches.items()}
        return {key: each for key, each in found.items() if each is not None} or self.chosen

    def end(self) -> None:
        """The last step is over: drop everything; others may have the recordings."""
        self.reset()
        self.memory.clear()
        self.slot = None

    def arrange(self, division: Division) -> None:
        """Other layers, of which nothing is kept yet."""
        self.division = division
        self.groups = [GroupState() for _ in division.recipes]
        self.reset()

    def send(self) -> None:
        """Numbers that were measured in this call go to the host."""
        found = [cache.fraction for cache in self.layers] + [self.error]
        send([each for each in found if each is not None and not each.sent])

    def group_of(self, index: int) -> GroupState:
        """The group that layer ``index`` is in."""
        return self.groups[self.division.of[index]]

    def expect(self, key: Hashable, signature: tuple) -> bool:
        """Start afresh, and say so, if what ``key`` gets is not what it got before.

        Args:
            key: a layer's index, or a name of what else is watched.
            signature: shapes, dtypes and devices.
        """
        if self._signatures.setdefault(key, signature) == signature:
            return False
        self.reset()
        self._signatures[key] = signature
        return True

    def prefetch(self, index: int, stores: bool) -> None:
        """Layer ``index`` runs soon, if there is one and it is not cached whole."""
        if index < len(self.layers):
            self.layers[index].prefetch(stores)

    def prefetch_carry(self, index: int, refreshes: bool) -> None:
        """Layer ``index`` runs next, if there is one and it is not cached whole."""
        if index < len(self.layers):
            self.layers[index].prefetch_carry(refreshes)

    def measured(self) -> Fraction | None:
        """A call is over: send what its forecasts were off by on its way to the host.

        Returns:
            That number, if it was an Update of which it is measured.
        """
        all_kept: list[Spans | Output] = [*(group.spans for group in self.groups), self.output]
        misses = [miss for kept in all_kept for miss in kept.misses]
        for kept in all_kept:
            kept.misses = []
        if not misses:
            return None
        off, true = (torch.stack(values).sum() for values in zip(*misses, strict=True))
        self.error = Fraction((off / true).sqrt())
        return self.error

    def nbytes(self) -> tuple[int, int]:
        """Bytes kept on the compute device and on the host."""
        device = host = 0
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        tensors += [tensor for group in self.groups for tensor in group.spans.tensors()]
        tensors += [value for value in self.memory.values() if isinstance(value, Tensor)]
        for tensor in tensors + self.output.tensors():
            size = tensor.untyped_storage().nbytes()
            if tensor.device.type == "cpu" and tensor.is_pinned():
                host += size
            else:
                device += size
        return device, host


def signature(value: Any) -> Any:
    """What of an argument the caches depend on: tensors of tokens, by shape, dtype and device."""
    if isinstance(value, Tensor) and value.ndim > 2:
        return value.shape, value.dtype, value.device
    return value if isinstance(value, bool) else None
