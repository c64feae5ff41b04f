"""How a block runs whose inside nobody knows: by its own forward, attention by the engine.

A torch function mode stands around the block's forward, on this thread, for this call: no class,
module or processor is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashomni.engine import Recipe
from flashomni.engine.layer import LayerRun
from flashomni.engine.schedules import StepKind
from flashomni.models.generic.attention import (
    SDPA,
    Attention,
    in_order,
    product_flops,
    valid_first,
)
from flashomni.symbols.choice.op import pool


class Guide:
    """The map of a cross-attention, for the policy of the blocks behind it.

    Args:
        recipe: only a policy that reads text, where there is none in the sequence, has a map made.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.map: Tensor | None = None

    def see(self, run: LayerRun, call: Attention) -> None:
        """A cross-attention behind the attention of ``run``."""
        grid, wide = run.grid, call.q.shape[1] // max(call.k.shape[1], 1)
        if grid.text_spans or not any(
            each.prefers_text
            for each in (self._recipe.policy_for(grid), *self._recipe.policies[1:])
        ):
            return
        if run.kind is StepKind.DISPATCH or call.q.shape[2] != run.rows:
            return
        means = pool(run.all_rows(call.q.transpose(1, 2)), grid.block_m)
        keys = call.k.repeat_interleave(wide, dim=1).float()
        scores = means @ keys.mT * call.scale
        mask = call.mask
        if mask is not None and (mask.ndim != 4 or mask.shape[2] != 1):
            return
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        self.map = scores.softmax(-1)

    def of(self, q: Tensor, block_m: int) -> Tensor | None:
        """The map, if it has the batch, heads and blocks of ``q [B, S, H, D]``."""
        expected = (q.shape[0], q.shape[2], -(-q.shape[1] // block_m))
        return self.map if self.map is not None and self.map.shape[:3] == expected else None


class InBlock(TorchFunctionMode):
    """Runs one attention of a block through the engine, and counts the FLOPs of the rest.

    Args:
        run: of the block; without attention of ours, whatever counts FLOPs.
        place: of that attention among those of the block; ``None`` for none.
        text: where the text is in the sequence, of so many tokens: gives the token range.
        guide: keeps the map of cross-attention.
    """

    def __init__(
        self,
        run: Any,
        place: int | None = None,
        text: Callable[[int], tuple[int, int]] = lambda seqlen: (0, 0),
        guide: Guide | None = None,
    ) -> None:
        super().__init__()
        self._run, self._place, self._text, self._guide = run, place, text, guide
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
            if self._guide is not None and self.has_begun and call.q.shape[2] != call.k.shape[2]:
                self._guide.see(run, call)
            return SDPA(*args, **kwargs)
        kv_len = None
        if call.mask is not None:
            order, kv_len = run.shared(valid_first, call.mask, q.shape[0])
            k, v = in_order(k, order), in_order(v, order)
        grid = run.begin(q.shape[1], text=self._text(q.shape[1]), kv_len=kv_len)
        self.has_begun = True
        guide = None if self._guide is None else self._guide.of(q, grid.block_m)
        o = run.attend(q, k, v, None, softmax_scale=call.scale, guide=guide)
        return o.transpose(1, 2)


def run_block(
    run: LayerRun,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    streams: Sequence[Tensor],
    place: int | None,
    text: Callable[[int], tuple[int, int]],
    guide: Guide | None = None,
) -> Any:
    """What ``forward(*args, **kwargs)`` returns.

    Args:
        run: of the block.
        forward: of the block.
        args: of the call, like ``kwargs``.
        streams: of the block.
        place: see :class:`InBlock`, like ``text`` and ``guide``.
    """
    with InBlock(run, place, text, guide) as mode:
        output = forward(*args, **kwargs)
    if not mode.has_begun:  # no attention of ours: the layer is cached whole, or not at all
        longest = max((x.shape[-2] for x in streams if x.ndim > 1), default=1)
        run.begin(max(longest, 1))
    return output
