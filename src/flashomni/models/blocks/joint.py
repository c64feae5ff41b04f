"""Joint attention over streams that have projections of their own, and the MLPs beside it.

Letters in shapes: B batch, S tokens of the whole sequence, R tokens of one stream, H num_heads,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.linear import Projection, is_hooked
from flashomni.kernels.common.rope import Rope
from flashomni.models.blocks.fused import gelu_linear, mlp

Order = tuple[Tensor, int]


@dataclass(frozen=True)
class Stream:
    """Tokens with their projections, at their place in the sequence.

    Args:
        x: ``[B, R, K]``, after norm and modulation.
        span: token range in the sequence.
        to_q, to_k, to_v: projections to ``H * D``.
        norm_q, norm_k: norms over head_dim, or ``None``.
        rope: ``(cos, sin)`` each fp32 ``[R, D / 2]``, an entry for each pair, or ``[B or 1, R, H or
            1, D / 2]`` where items or heads have their own; or ``None``.
        order: int64 ``[B, T]``, which of the T rows that it has on all ranks comes first, second,
            ... in the keys and values: valid ones in front of padding; and where it begins in the
            whole sequence. ``None`` leaves them as they are. Queries stay in any case.
        rope_layout: whether the members of a pair are neighbours, or ``"half"`` a head apart.
    """

    x: Tensor
    span: tuple[int, int]
    to_q: Projection
    to_k: Projection
    to_v: Projection
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    rope: Rope | None
    order: Order | None = None
    rope_layout: str = "interleaved"


def own_stream(
    attn: Any,
    x: Tensor,
    span: tuple[int, int],
    rope: Rope | None,
    order: Order | None = None,
    rope_layout: str = "interleaved",
) -> Stream:
    """A stream through the attention's main projections."""
    projections = (attn.to_q, attn.to_k, attn.to_v)
    norms = (attn.norm_q, attn.norm_k)
    return Stream(x, span, *projections, *norms, rope, order, rope_layout)


def added_stream(
    attn: Any, x: Tensor, span: tuple[int, int], rope: Rope | None, order: Order | None = None
) -> Stream:
    """A stream through the attention's added projections (the text of a dual block)."""
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return Stream(x, span, *projections, attn.norm_added_q, attn.norm_added_k, rope, order)


def joint_attention(
    run: LayerRun,
    attn: Any,
    streams: list[Stream],
    out_projection: nn.Module,
    *,
    guide: Tensor | None = None,
    gate: Tensor | None = None,
    meanwhile: Callable[[], object] | None = None,
) -> Tensor:
    """Attention of all streams together: ``[B, S, H, D]`` in the order of their spans.

    Values come first, then keys, then queries: where ranks share the sequence, each is under way
    while the next is projected.

    Args:
        run: of the block.
        attn: whose ``heads`` and ``inner_dim`` count.
        streams: the parts of the sequence; one for a model with self-attention alone.
        out_projection: see :meth:`LayerRun.attend`, like ``guide``, ``gate`` and ``meanwhile``.
    """
    num_heads, batch = attn.heads, streams[0].x.shape[0]
    seqlen = sum(stream.x.shape[1] for stream in streams)
    q, k, v = (
        streams[0].x.new_empty(batch, seqlen, num_heads, attn.inner_dim // num_heads)
        for _ in range(3)
    )
    for stream in streams:
        run.project(stream.x, stream.to_v, v[:, slice(*stream.span)])
        run.count("qkv", (stream.to_k, stream.to_v), batch * stream.x.shape[1])
    sent_v = run.send(v)
    for stream in streams:
        rope, layout = stream.rope, stream.rope_layout
        place = k[:, slice(*stream.span)]
        run.project(stream.x, stream.to_k, place, norm=stream.norm_k, rope=rope, rope_layout=layout)
    sent_k = run.send(k)
    for stream in streams:
        run.project_q(
            stream.x,
            stream.to_q,
            q[:, slice(*stream.span)],
            norm=stream.norm_q,
            rope=stream.rope,
            row_offset=stream.span[0],
            rope_layout=stream.rope_layout,
        )
    orders = [stream.order for stream in streams if stream.order is not None]
    return run.attend(
        run.send(q),
        sent_k,
        sent_v,
        out_projection,
        guide=guide,
        gate=gate,
        key_orders=orders,
        meanwhile=meanwhile,
    )


class Later:
    """Computes something once: when it is called, or when it is taken.

    It holds neither what it computes from nor the value for longer than it has to: those are the
    widest tensors of a block.

    Args:
        make: what.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._value: Tensor | None = None

    def __call__(self) -> None:
        if self._make is not None:
            self._value, self._make = self._make(), None

    def take(self) -> Tensor:
        """The value, which goes with whoever takes it: once."""
        self()
        value, self._value = self._value, None
        assert value is not None, "taken before"
        return value


def valid_first(mask: Tensor) -> Tensor:
    """Positions of the valid tokens, then of the others, in their order: int64 ``[B, R]``.

    Attention does not mind the order of its keys, so with this one any mask is a valid length.

    Args:
        mask: ``[B, R]``, not zero at valid tokens.
    """
    return torch.argsort((mask == 0).to(torch.uint8), dim=1, stable=True)


def dual_attention(run: LayerRun, attn: Any, vision: Stream, text: Stream) -> tuple[Tensor, Tensor]:
    """Joint attention of a dual-stream block, each stream with its own output projection.

    Returns:
        ``(vision [B, R, N], text [B, R', N])``.
    """
    to_out, dropout = attn.to_out
    o = joint_attention(run, attn, [vision, text], to_out)
    y = run.project_o(o[:, slice(*vision.span)], to_out, row_offset=vision.span[0])
    context = o[:, slice(*text.span)].flatten(2)
    run.count("qkv", (attn.to_add_out,), context.shape[0] * context.shape[1])
    return dropout(y), attn.to_add_out(context)


def feed_forward(run: LayerRun, module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, counted."""
    run.count("mlp", (module,), x.shape[0] * x.shape[1])
    return mlp(module, x)


def gelu_up(run: LayerRun, block: Any, x: Tensor) -> Tensor:
    """The first half of a single block's MLP, counted."""
    run.count("mlp", (block.proj_mlp,), x.shape[0] * x.shape[1])
    is_tanh = type(block.act_mlp) is nn.GELU and block.act_mlp.approximate == "tanh"
    is_tanh = is_tanh and not is_hooked(block.act_mlp)
    return gelu_linear(block.proj_mlp, x) if is_tanh else block.act_mlp(block.proj_mlp(x))
