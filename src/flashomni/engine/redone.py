"""What attention kernels had to do again, by layer; they remember it on the device themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.kernels.attention.op import REDONE


class Redone:
    """The ``redone`` of each layer's attention calls, from one generation to the next.

    Which layers have logits that an anchored softmax cannot follow is a matter of the model, and
    the kernels that anchor settle it on the device (see :func:`flashomni.sparse_attention`). The
    memory stays where it is, so that captured calls find it.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._words: Tensor | None = None
        self._rows: tuple[Tensor, ...] = ()

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """One memory a layer, int32 ``[4]``; none where no kernel anchors."""
        if device.type != "cuda":
            return ()
        if self._words is None or self._words.device != device:
            # A model may be called under inference mode, and outside of it later.
            with torch.inference_mode(False):
                shape = (self._num_layers, REDONE)
                self._words = torch.zeros(shape, dtype=torch.int32, device=device)
                self._rows = tuple(self._words[i] for i in range(self._num_layers))
        return self._rows

    def reset(self) -> None:
        """Forget it."""
        if self._words is not None:
            self._words.zero_()

    def counts(self) -> list[int]:
        """Tiles that were done again so far, by layer; waits for the device."""
        return [0] * self._num_layers if self._words is None else self._words[:, 0].tolist()

    def notes(self) -> list[str]:
        """For the report, where there is something to say; waits for the device."""
        counts = self.counts()
        total, layers = sum(counts), sum(count > 0 for count in counts)
        if total == 0:
            return []
        return [
            f"attention did {total:,} tiles of 128 queries again in {layers} layers so far, whose "
            "logits rise too far for an anchored softmax"
        ]
