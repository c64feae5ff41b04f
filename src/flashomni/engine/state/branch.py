"""What one conditioning branch (cond, uncond, ...) of a generation remembers between steps."""

from __future__ import annotations

from flashomni.engine.recipe import Recipe
from flashomni.engine.state.cache import LayerCache
from flashomni.engine.state.span import Spans, Streams
from flashomni.engine.state.storage import Storage


class Branch:
    """State of all layers for one branch.

    Attributes:
        layers: what each layer remembers of its own.
        spans: layers that are cached whole.
        last_update: step of the last Update, ``None`` before the first.
    """

    def __init__(self, num_layers: int, recipe: Recipe) -> None:
        self._num_layers, self._recipe = num_layers, recipe
        self.reset()

    def reset(self) -> None:
        self.layers = [LayerCache() for _ in range(self._num_layers)]
        self.spans = Spans(self._recipe.layer_order, Storage(self._recipe.history_dtype))
        self.last_update: int | None = None
        self._signatures: dict[int, tuple] = {}

    def expect(self, index: int, streams: Streams) -> None:
        """Start afresh if layer ``index`` gets another shape, dtype or device than before."""
        signature = tuple((stream.shape, stream.dtype, stream.device) for stream in streams)
        if self._signatures.get(index, signature) != signature:
            self.reset()
        self._signatures[index] = signature

    def prefetch(self, index: int, stores: bool) -> None:
        """Layer ``index`` runs soon, if there is one and it is not cached whole."""
        if index < len(self.layers):
            self.layers[index].prefetch(stores)

    def nbytes(self) -> tuple[int, int]:
        """Bytes kept on the compute device and on the host."""
        device = host = 0
        tensors = [tensor for layer in self.layers for tensor in layer.tensors()]
        for tensor in tensors + self.spans.tensors():
            size = tensor.untyped_storage().nbytes()
            if tensor.device.type == "cpu" and tensor.is_pinned():
                host += size
            else:
                device += size
        return device, host
