"""LTX2VideoTransformer3DModel: LTX-2, video and audio together.

A block has six attentions: each stream to itself, to the text, and to the other. That of the video
to itself is by far the largest, and runs here; the others are called as they are. In LTX-2.3 a gate
of each head lies between attention and projection. Where guidance replaces attention by its values
(spatio-temporal guidance), or it has a mask, it is called as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.token_order import TokenOrder
from flashomni.models import Reliance, Site, adapter
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks import feed_forward
from flashomni.models.generic.run import Guide, InBlock
from flashomni.models.ltx import LTXVideo, add, modulation, scaled, self_attention

STREAMS = ("hidden_states", "audio_hidden_states")


@adapter("LTX2VideoTransformer3DModel")
class LTX2Video(LTXVideo):
    sizes: ClassVar = {
        "tiny": {  # as LTX-2.3, but for where its text comes from
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "cross_attention_dim": 48,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 3,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 24,
            "num_layers": 3,
            "caption_channels": 24,
            "rope_type": "split",
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "perturbed_attn": True,
        },
        "published": {},  # diffusers' defaults, those of LTX-2.0
    }

    def sites(self, model: Any) -> list[Site]:
        own = {"temb": 3, "temb_ca_scale_shift": 3, "temb_ca_gate": 3}
        return [
            Site(
                f"transformer_blocks.{i}",
                block,
                run_block,
                STREAMS,
                by_token=own,
                modulated=modulated,
            )
            for i, block in enumerate(model.transformer_blocks)
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        processors = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
        found = []
        for i, block in enumerate(model.transformer_blocks):
            name = f"transformer_blocks.{i}"
            found += rely_on_attention(
                f"{name}.attn1", block.attn1, ("LTX2Attention",), *processors
            )
            found.append(Reliance(name, block, ("LTX2VideoTransformerBlock",), BLOCK))
        return found

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        text = torch.arange(77) < torch.tensor([[77], [30]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 5 * 9 * 7, 4),
            "audio_hidden_states": torch.randn(2, 21, 4),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "audio_encoder_hidden_states": torch.randn(2, 77, 24),
            "timestep": torch.full((2,), 500.0),
            "sigma": torch.full((2,), 0.5),
            "encoder_attention_mask": text.long(),
            "audio_encoder_attention_mask": text.long(),
            "num_frames": 5,
            "height": 9,
            "width": 7,
            "audio_num_frames": 21,
        }


def run_block(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """A block of LTX-2.

    Args:
        hidden_states: ``[B, S, K]``, S tokens of the video.
        audio_hidden_states: ``[B, S', K']``.
        encoder_hidden_states: ``[B, T, K]``, the text for the video.
        audio_encoder_hidden_states: ``[B, T, K']``, the text for the audio.
        temb: ``[B, 1 or S, N K]``, N vectors of modulation.
        temb_audio: ``[B, 1 or S', N K']``.
        rest: the other arguments by the names that the block gives them.
    """
    x, a, backend = hidden_states, audio_hidden_states, run.backend
    if run.geometry is not None and run.geometry.tokens is not None:
        rest = _in_order(run, run.geometry.tokens, rest)
    video = modulation(block.scale_shift_table, temb)
    audio = modulation(block.audio_scale_shift_table, temb_audio)

    norm_x = scaled(block.norm1, x, video[1], video[0], backend)
    y = _attend(run, block.attn1, norm_x, rest)
    x = add(x, y, video[2], backend)
    # What is called as it is has its FLOPs counted.
    called, to_text = InBlock(run), InBlock(run, guide=run.shared(Guide, run.recipe))
    called.has_begun = to_text.has_begun = True
    with called:
        norm_a = _modulate(block.audio_norm1(a), audio[:2])
        mask, rope = rest.get("audio_self_attention_mask"), rest["audio_rotary_emb"]
        y = block.audio_attn1(norm_a, None, mask, rope, **_perturbation(rest))
        a = add(a, y, audio[2], backend)
    with to_text:
        x = _read(block, "", x, encoder_hidden_states, video, rest, backend)
    with called:
        a = _read(block, "audio_", a, audio_encoder_hidden_states, audio, rest, backend)
        x, a = _exchange(block, x, a, rest, backend)
    norm_x = scaled(block.norm3, x, video[4], video[3], backend)
    x = add(x, feed_forward(run, block.ff, norm_x), video[5], backend)
    y = feed_forward(run, block.audio_ff, _modulate(block.audio_norm3(a), audio[3:]))
    return x, add(a, y, audio[5], backend)


def modulated(
    block: Any, hidden_states: Tensor, *args: Any, backend: str | None = None, **kwargs: Any
) -> Tensor:
    """Tokens of the video after the first norm and modulation of a block."""
    temb = kwargs["temb"] if "temb" in kwargs else args[3]
    shift, scale, *_ = modulation(block.scale_shift_table, temb)
    return scaled(block.norm1, hidden_states, scale, shift, backend)


def _attend(run: LayerRun, attn: Any, x: Tensor, rest: dict[str, Any]) -> Tensor:
    """Attention of the video to itself, after its projection."""
    mask = rest.get("self_attention_mask")
    if mask is None and rest.get("perturbation_mask") is None:
        gate = None
        if attn.to_gate_logits is not None:
            run.count("qkv", (attn.to_gate_logits,), x.shape[0] * x.shape[1])
            gate = 2.0 * torch.sigmoid(attn.to_gate_logits(x))[..., None]
        layout = "half" if attn.rope_type == "split" else "interleaved"
        return self_attention(run, attn, x, rest["video_rotary_emb"], layout, gate)
    run.begin(x.shape[1])
    with InBlock(run) as called:
        called.has_begun = True
        return attn(x, None, mask, rest["video_rotary_emb"], **_perturbation(rest))


def _perturbation(rest: dict[str, Any]) -> dict[str, Any]:
    """What a self-attention gets in a block whose attention guidance perturbs."""
    if rest.get("perturbation_mask") is None:
        return {}
    return {name: rest.get(name) for name in ("perturbation_mask", "all_perturbed")}


def _read(
    block: Any,
    side: str,
    x: Tensor,
    text: Tensor,
    mod: tuple[Tensor, ...],
    rest: dict[str, Any],
    backend: str | None,
) -> Tensor:
    """A stream and what it reads in the text.

    Args:
        side: what names of the audio's parts begin with, ``audio_``; empty for the video's.
        x: ``[B, R, K]``.
        text: ``[B, T, K]``.
        mod: modulation of the stream; the last three are for this, if there are nine.
        rest: arguments of the block.
    """
    norm, has_own = getattr(block, f"{side}norm2"), len(mod) == 9
    norm_x = scaled(norm, x, mod[7], mod[6], backend) if has_own else norm(x)
    if block.cross_attn_adaln:
        table = getattr(block, f"{side}prompt_scale_shift_table")
        temb = rest.get("temb_prompt_audio" if side else "temb_prompt")
        if temb is None:  # LTX-2.5 has the table alone
            text = _modulate(text, table[None, None].to(x).unbind(2))
        else:
            text = _modulate(text, modulation(table, temb))
    y = getattr(block, f"{side}attn2")(norm_x, text, rest.get(f"{side}encoder_attention_mask"))
    return add(x, y, mod[8], backend) if has_own else x + y


def _exchange(
    block: Any, x: Tensor, a: Tensor, rest: dict[str, Any], backend: str | None
) -> tuple[Tensor, Tensor]:
    """Video and audio, with what each reads in the other as it was."""
    to_video, to_audio = (rest.get(f"use_{way}_cross_attention", True) for way in ("a2v", "v2a"))
    if not (to_video or to_audio):
        return x, a
    table, other = (
        getattr(block, f"{side}_a2v_cross_attn_scale_shift_table") for side in ("video", "audio")
    )
    # Scale and shift for the way to the video, then for that to the audio.
    x_scale, x_shift, x_scale_2, x_shift_2 = modulation(table[:4], rest["temb_ca_scale_shift"])
    a_scale, a_shift, a_scale_2, a_shift_2 = modulation(
        other[:4], rest["temb_ca_audio_scale_shift"]
    )
    norm_x, norm_a = block.audio_to_video_norm(x), block.video_to_audio_norm(a)
    ropes = rest["ca_video_rotary_emb"], rest["ca_audio_rotary_emb"]
    if to_video:
        asks, told = _modulate(norm_x, (x_shift, x_scale)), _modulate(norm_a, (a_shift, a_scale))
        y = block.audio_to_video_attn(asks, told, rest.get("a2v_cross_attention_mask"), *ropes)
        x = add(x, y, modulation(table[4:], rest["temb_ca_gate"])[0], backend)
    if to_audio:
        asks = _modulate(norm_a, (a_shift_2, a_scale_2))
        told = _modulate(norm_x, (x_shift_2, x_scale_2))
        mask = rest.get("v2a_cross_attention_mask")
        y = block.video_to_audio_attn(asks, told, mask, *ropes[::-1])
        a = add(a, y, modulation(other[4:], rest["temb_ca_audio_gate"])[0], backend)
    return x, a


def _modulate(x: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
    """``x * (1 + scale) + shift``, where ``mod`` begins with shift and scale."""
    return x * (1 + mod[1]) + mod[0]


def _in_order(run: LayerRun, tokens: TokenOrder, rest: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a block with RoPE tables in the order of the tokens.

    (Those of the video's own attention follow where they are used; see :func:`self_attention`.)

    Raises:
        NotImplementedError: there is a mask of pairs of tokens.
    """
    if rest.get("self_attention_mask") is not None or rest.get("perturbation_mask") is not None:
        raise NotImplementedError(
            f"token_order {tokens.order!r} with a self-attention mask or spatio-temporal guidance "
            "is not supported for LTX-2; take token_order 'raster'"
        )
    tables = run.shared(_moved, tokens, *rest["ca_video_rotary_emb"])
    return {**rest, "ca_video_rotary_emb": tables}


def _moved(tokens: TokenOrder, *tables: Tensor) -> tuple[Tensor, ...]:
    """Tables ``[B, S, D]``, or ``[B, H, S, D / 2]``."""
    return tuple(tokens.enter(table, table.ndim - 2) for table in tables)
