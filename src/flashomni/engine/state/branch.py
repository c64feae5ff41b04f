"""What one conditioning branch (cond, uncond, ...) of a generation remembers between steps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from flashomni.engine.recipe import Recipe
from flashomni.engine.state.cache import LayerCache
from flashomni.engine.state.output import Output
from flashomni.engine.state.span import Spans
from flashomni.engine.state.storage import Storage


class Branch:
    """State of all layers for one branch.

    Attributes:
        layers: what each layer remembers of its own.
        spans: layers that are cached whole.
        output: of the whole model, where the recipe caches that.
        computed: the steps that this branch has computed, in order.
        stored: the last of them that added to the histories, ``None`` before the first.
        memory: scratch of a schedule that decides late.
    """

    def __init__(self, num_layers: int, recipe: Recipe, backend: str | None = None) -> None:
        self._num_layers, self._recipe, self._backend = num_layers, recipe, backend
        self.computed: list[int] = []
        self.memory: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Drop everything that is kept; the steps that were computed stay known."""
        order, storage = self._recipe.forecast.layer_order, self._recipe.storage
        kept = Storage(storage.history_dtype, backend=self._backend)
        self.layers = [LayerCache() for _ in range(self._num_layers)]
        self.spans = Spans(order, kept)
        self.output = Output(order, kept)
        self.stored: int | None = None
        self._signatures: dict[Hashable, tuple] = {}

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

    def nbytes(self) -> tuple[int, int]:
        """Bytes kept on the compute device and on the host."""
        device = host = 0
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        for tensor in tensors + self.spans.tensors() + self.output.tensors():
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
