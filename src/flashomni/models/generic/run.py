"""How a block runs whose inside nobody knows: by its own forward, attention by the engine.

A torch function mode stands around the block's forward, on this thread, for this call: no class,
module or processor is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashomni.engine.layer import LayerRun
from flashomni.models.generic.attention import (
    SDPA,
    Attention,
    in_order,
    product_flops,
    valid_first,
)


class InBlock(TorchFunctionMode):
    """Runs one attention of a block through the engine, and counts the FLOPs of the rest.

    Args:
        run: of the block; without attention of ours, whatever counts FLOPs.
        place: of that attention among those of the block; ``None`` for none.
        text: where the text is in the sequence, of so many tokens: gives the token range.
    """

    def __init__(
        self,
        run: Any,
        place: int | None = None,
        text: Callable[[int], tuple[int, int]] = lambda seqlen: (0, 0),
    ) -> None:
        super().__init__()
        self._run, self._place, self._text = run, place, text
        self._count = 0
        self.has_begun = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            return self._attention(args, kwargs)
        output = func(*args, **kwargs)
        flops = product_flops(func, args, kwargs, output)
        if flops:
            self._run.add("mlp", flops)
        return output

    def _attention(self, args: tuple, kwargs: dict) -> Tensor:
        run, call = self._run, Attention.of(args, kwargs)
        is_ours = self._count == self._place and call.why_not(run.backend) is None
        self._count += 1
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        if not is_ours or not run.can_attend(q):
            run.add("attention", call.flops)
            return SDPA(*args, **kwargs)
        kv_len = None
        if call.mask is not None:
            order, kv_len = run.shared(valid_first, call.mask, q.shape[0])
            k, v = in_order(k, order), in_order(v, order)
        run.begin(q.shape[1], text=self._text(q.shape[1]), kv_len=kv_len)
        self.has_begun = True
        return run.attend(q, k, v, None, softmax_scale=call.scale).transpose(1, 2)


def run_block(
    run: LayerRun,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    streams: Sequence[Tensor],
    place: int | None,
    text: Callable[[int], tuple[int, int]],
) -> Any:
    """What ``forward(*args, **kwargs)`` returns.

    Args:
        run: of the block.
        forward: of the block.
        args: of the call, like ``kwargs``.
        streams: of the block.
        place: see :class:`InBlock`, like ``text``.
    """
    with InBlock(run, place, text) as mode:
        output = forward(*args, **kwargs)
    if not mode.has_begun:  # no attention of ours: the layer is cached whole, or not at all
        longest = max((x.shape[-2] for x in streams if x.ndim > 1), default=1)
        run.begin(max(longest, 1))
    return output
