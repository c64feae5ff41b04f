"""FLOPs of one generation, counted by torch: for methods that do not count their own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from flashomni.lab.generation import Generation
from flashomni.models import transformers_of


class _FlopCounter(TorchDispatchMode):
    """Sums torch's own FLOP formulas; unlike FlopCounterMode it does not walk the module tree,
    which has cycles under some peers."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))  # torch's table lacks it
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(generation: Generation) -> float:
    """FLOPs of the transformers in one generation, counted by torch; slow, and not timed."""
    counter = _FlopCounter()

    def start(*_: Any) -> None:
        counter.__enter__()

    def stop(*_: Any) -> None:
        counter.__exit__(None, None, None)

    handles: list[Any] = []
    for model in transformers_of(generation.pipe).values():
        handles.append(model.register_forward_pre_hook(start))
        handles.append(model.register_forward_hook(stop, always_call=True))
    try:
        generation.discard()
    finally:
        for handle in handles:
            handle.remove()
    return float(counter.total)
