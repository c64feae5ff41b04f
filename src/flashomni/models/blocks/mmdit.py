"""What the MMDiT models share: joint attention over streams with projections of their own.

Letters in shapes: B batch, S tokens of the whole sequence, R tokens of one stream, H num_heads,
D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope
from flashomni.models import BlockRun, Site
from flashomni.models.blocks.fused import gelu_linear, mlp


@dataclass(frozen=True)
class Stream:
    """Tokens with their projections, at their place in the sequence.

    Args:
        x: ``[B, R, K]``, after norm and modulation.
        span: token range in the sequence.
        to_q, to_k, to_v: projections to ``H * D``.
        norm_q, norm_k: norms over head_dim, or ``None``.
        rope: ``(cos, sin)`` each fp32 ``[R, D / 2]``, an entry for each pair of neighbours, or
            ``None``.
    """

    x: Tensor
    span: tuple[int, int]
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    norm_q: nn.Module | None
    norm_k: nn.Module | None
    rope: Rope | None


VISION, TEXT = "hidden_states", "encoder_hidden_states"  # the streams, as diffusers names them


def dual_and_single(
    model: Any, run_dual: BlockRun, run_single: BlockRun, streams: tuple[str, str]
) -> list[Site]:
    """The sites of a model of dual-stream blocks and then single-stream ones."""
    groups = (("transformer_blocks", run_dual), ("single_transformer_blocks", run_single))
    return [
        Site(f"{group}.{i}", block, run, streams)
        for group, run in groups
        for i, block in enumerate(getattr(model, group))
    ]


def own_stream(attn: Any, x: Tensor, span: tuple[int, int], rope: Rope | None) -> Stream:
    """A stream through the attention's main projections."""
    projections = (attn.to_q, attn.to_k, attn.to_v)
    return Stream(x, span, *projections, attn.norm_q, attn.norm_k, rope)


def added_stream(attn: Any, x: Tensor, span: tuple[int, int], rope: Rope | None) -> Stream:
    """A stream through the attention's added projections (the text of a dual block)."""
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return Stream(x, span, *projections, attn.norm_added_q, attn.norm_added_k, rope)


def joint_attention(
    run: LayerRun, attn: Any, streams: list[Stream], out_projection: nn.Module
) -> Tensor:
    """Attention of all streams together: ``[B, S, H, D]`` in the order of their spans."""
    num_heads, batch, seqlen = attn.heads, streams[0].x.shape[0], run.grid.seqlen_q
    q, k, v = (
        streams[0].x.new_empty(batch, seqlen, num_heads, attn.inner_dim // num_heads)
        for _ in range(3)
    )
    for stream in streams:
        rows = slice(*stream.span)
        run.project_q(
            stream.x,
            stream.to_q,
            q[:, rows],
            norm=stream.norm_q,
            rope=stream.rope,
            row_offset=stream.span[0],
        )
        run.project(stream.x, stream.to_k, k[:, rows], norm=stream.norm_k, rope=stream.rope)
        run.project(stream.x, stream.to_v, v[:, rows])
        run.count("qkv", (stream.to_k, stream.to_v), batch * stream.x.shape[1])
    return run.attend(q, k, v, out_projection)


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
    return gelu_linear(block.proj_mlp, x) if is_tanh else block.act_mlp(block.proj_mlp(x))


def split_rope(rope: Rope, start: int, stop: int) -> Rope:
    """Rows of the RoPE tables."""
    return rope[0][start:stop], rope[1][start:stop]


def require_processor(blocks: dict[str, Any], allowed: str) -> None:
    """Refuse a foreign attention processor, backend or parallel plan, by name.

    Raises:
        NotImplementedError: a block's processor is not ``allowed``, or has an attention backend or
            a parallel config set, which our attention would ignore.
    """
    for name, block in blocks.items():
        processor = block.attn.processor
        if type(processor).__name__ != allowed:
            raise NotImplementedError(
                f"{name}: attention processor {type(processor).__name__} is not supported, only "
                f"{allowed} is (unload an IP-Adapter, or set the default processor)"
            )
        backend = getattr(processor, "_attention_backend", None)
        if backend is not None:
            raise NotImplementedError(
                f"{name}: attention backend {getattr(backend, 'value', backend)!r} is set, but an "
                "accelerated model uses its own attention; call "
                "transformer.reset_attention_backend() first"
            )
        if getattr(processor, "_parallel_config", None) is not None:
            raise NotImplementedError(
                f"{name}: context parallelism is not supported; call accelerate without it"
            )
