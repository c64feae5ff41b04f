"""tiny-wan: a WanPipeline of stock classes and small sizes, and its transformer as it is trained.

Text enters by cross attention alone: the self-attention's sequence is the video's 4,352, 17,408 or
32,912 tokens. The autoencoder is tiny-video's, as it is; what WanPipeline asks of one (mean and
deviation of the latents, their channels, the compression) stands in its config.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers import UMT5Config, UMT5EncoderModel

from training import scenes, tiny_models
from training.attention import attend
from training.word_tokenizers import t5_tokenizer

HEADS, HEAD_DIM, LAYERS, FFN = 2, 64, 8, 384
CHANNELS, COMPRESSION = 8, 4  # of the latents; in space and in time
SHIFT = 8.0  # the pipeline has one for all sizes
KIND = tiny_models.Kind(
    "tiny-wan",
    128,
    65,
    (),
    {
        "height": 128,
        "width": 128,
        "num_frames": 65,
        "num_inference_steps": 28,
        "guidance_scale": 1.0,
        "max_sequence_length": tiny_models.TEXT_TOKENS,
    },
    default=1,
)


def _autoencoder(folder: str | os.PathLike) -> AutoencoderKLHunyuanVideo:
    """The autoencoder of the pipeline in ``folder``, with the entries that WanPipeline reads."""
    saved = AutoencoderKLHunyuanVideo.from_pretrained(Path(folder) / "vae", local_files_only=True)
    kept = {k: v for k, v in saved.config.items() if not k.startswith("_")}
    vae = AutoencoderKLHunyuanVideo.from_config(kept)
    vae.load_state_dict(saved.float().state_dict())
    vae.register_to_config(
        z_dim=CHANNELS,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1 / vae.config.scaling_factor] * CHANNELS,
        scale_factor_temporal=COMPRESSION,
        scale_factor_spatial=COMPRESSION,
    )
    return vae


def _zero_start(transformer: WanTransformer3DModel) -> None:
    """Every block begins as the identity and the model as zero, which steadies early training."""
    zero = [transformer.proj_out, transformer.condition_embedder.time_proj]
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table[:, [2, 5]] = 0  # gates
            zero.append(block.attn2.to_out[0])  # it has no gate
        for linear in zero:
            linear.weight.zero_()
            linear.bias.zero_()


def build(autoencoder: str | os.PathLike, seed: int = 0) -> WanPipeline:
    """An untrained pipeline in evaluation mode, with the autoencoder of a saved one."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(scenes.words(), tiny_models.TEXT_TOKENS)
    text_width = 64
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=text_width,
                d_kv=32,
                d_ff=128,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        ),
        vae=_autoencoder(autoencoder),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=text_width,
            freq_dim=128,
            ffn_dim=FFN,
            num_layers=LAYERS,
            rope_max_seq_len=128,
        ),
    )
    _zero_start(pipe.transformer)
    for part in tiny_models.modules(pipe).values():
        part.eval()
    return pipe


def _before(
    block: nn.Module, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    """q, k, v ``[B, S, H, D]`` of the self-attention, rotated."""
    table, attn = block.scale_shift_table + time, block.attn1
    y = block.norm1(x) * (1 + table[:, 1:2]) + table[:, 0:1]
    q, k, v = (linear(y) for linear in (attn.to_q, attn.to_k, attn.to_v))
    q, k = _normed(q, attn.norm_q), _normed(k, attn.norm_k)
    q, k = (_rotated(z.unflatten(2, (attn.heads, -1)), cos, sin).to(v.dtype) for z in (q, k))
    return q, k, v.unflatten(2, (attn.heads, -1))


def _between(
    block: nn.Module, x: Tensor, out: Tensor, time: Tensor, text: Tensor
) -> tuple[Tensor, ...]:
    """The stream behind the self-attention; q, k, v of the cross attention."""
    gate = block.scale_shift_table[:, 2:3] + time[:, 2:3]
    x = x + block.attn1.to_out[0](out.flatten(2)) * gate
    attn = block.attn2
    q, k, v = attn.to_q(block.norm2(x)), attn.to_k(text), attn.to_v(text)
    q, k = _normed(q, attn.norm_q).to(v.dtype), _normed(k, attn.norm_k).to(v.dtype)
    q, k, v = (z.unflatten(2, (attn.heads, -1)) for z in (q, k, v))
    return x, q, k, v


def _after(block: nn.Module, x: Tensor, out: Tensor, time: Tensor) -> Tensor:
    """The stream behind the block."""
    table = block.scale_shift_table + time
    shift, scale, gate = table[:, 3:4], table[:, 4:5], table[:, 5:6]
    x = x + block.attn2.to_out[0](out.flatten(2))
    return x + block.ffn(block.norm3(x) * (1 + scale) + shift).float() * gate


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], norm.weight, norm.eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Network:
    """WanTransformer3DModel's forward pass in parts: the residual stream in float32 under autocast.

    What lies between the calls of attention is compiled on demand, once for all sizes; attention
    itself is torch's kernel ``backend``, which may change with every call.

    Attributes:
        backend: the kernel of the self-attention, or None for torch's own choice.
        watch: called with q and k ``[B, S, H, D]``, rotated, and 0 text tokens; or None.
    """

    def __init__(self, transformer: WanTransformer3DModel, compiled: bool = False):
        self.transformer, self.rope = transformer, transformer.rope
        self.backend: SDPBackend | None = None
        self.watch: Callable[[Tensor, Tensor, int], None] | None = None
        parts = (_before, _between, _after)
        self.parts = [torch.compile(p, dynamic=True) for p in parts] if compiled else parts

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity, like ``latents`` [B, C, F, h, w], at ``timestep`` [B] in [0, 1000]."""
        model = self.transformer
        before, between, after = self.parts
        cos, sin = self.rope(latents)
        cos, sin = cos[..., ::2].float().contiguous(), sin[..., 1::2].float().contiguous()
        x = model.patch_embedding(latents).float().flatten(2).transpose(1, 2).contiguous()
        embedded, time, text, _ = model.condition_embedder(timestep, text)
        time = time.unflatten(1, (6, -1)).float()
        for block in model.blocks:
            q, k, v = before(block, x, time, cos, sin)
            if self.watch is not None:
                self.watch(q, k, 0)
            out = attend(q, k, v, self.backend)
            x, q, k, v = between(block, x, out, time, text)
            x = after(block, x, attend(q, k, v, None), time)
        shift, scale = (model.scale_shift_table + embedded.float()[:, None]).chunk(2, 1)
        out = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
        _, high, wide = model.config.patch_size
        frames, rows, columns = latents.shape[2], latents.shape[3] // high, latents.shape[4] // wide
        out = out.unflatten(2, (high, wide, -1)).unflatten(1, (frames, rows, columns))
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(latents.shape)

    def predict(self, pipe, kind, latents, sigma, text, pooled, mask) -> Tensor:
        """Called like :func:`training.flow.velocity`."""
        return self(latents, sigma * 1000, text)
