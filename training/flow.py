"""The flow-matching objective and a plain Euler sampler, as the stock pipelines compute them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import FluxPipeline
from torch import nn

from training import tiny_models


class StageRope(nn.Module):
    """A video model's rotary embedding at the native clip's positions, for a shorter clip.

    Latent frame j > 0 of a clip with every s-th frame shows the time of native latent frame
    ``s j - 1.5 (s - 1) / 4``: the middle of the four frames that it encodes. Positions are
    dimension ``dim`` of what ``rope`` gives: 0 of HunyuanVideo's, 1 of Wan's.
    """

    def __init__(self, rope: nn.Module, stride: int, dim: int = 0):
        super().__init__()
        self.rope, self.stride, self.dim = rope, stride, dim

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.stride == 1:
            return self.rope(hidden_states)
        frames = hidden_states.shape[2]
        native = hidden_states.new_empty(()).expand(
            1, 1, self.stride * frames, *hidden_states.shape[3:]
        )
        dim = self.dim
        cos, sin = (t.unflatten(dim, (self.stride * frames, -1)) for t in self.rope(native))
        middle = self.stride * torch.arange(frames, device=cos.device)
        middle[1:] -= round(0.375 * (self.stride - 1))
        cos, sin = (t.index_select(dim, middle).flatten(dim, dim + 1) for t in (cos, sin))
        return cos, sin


def float_residual(transformer: nn.Module) -> None:
    """Keep the residual stream in float32 under autocast, and with it Flux's time steps.

    Flux casts the time to the type of its first hidden state; bf16 would round 1000 levels to 256.
    """
    transformer.x_embedder.register_forward_hook(lambda module, inputs, output: output.float())


def velocity(
    pipe,
    kind,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The model's velocity for ``latents`` [B, C, h, w] or [B, C, F, h, w] at ``sigma`` [B]."""
    if kind.video:
        return pipe.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            encoder_attention_mask=mask.to(text.dtype),
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    batch, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    rows, cols = height // 2, width // 2
    scale = kind.size // 4 / rows  # a coarse picture spans the native positions
    axis = (torch.arange(max(rows, cols), device=latents.device) + 0.5) * scale - 0.5
    ids = latents.new_zeros(rows, cols, 3)
    ids[..., 1], ids[..., 2] = axis[:rows, None], axis[None, :cols]
    out = pipe.transformer(
        hidden_states=packed,
        timestep=sigma,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        img_ids=ids.flatten(0, 1),
        txt_ids=latents.new_zeros(text.shape[1], 3),
        return_dict=False,
    )[0]
    out = out.unflatten(1, (rows, cols)).unflatten(-1, (channels, 2, 2))
    return out.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """The scheduler's time shift."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def spread_levels(count: int, device) -> torch.Tensor:
    """Logit-normal noise levels [count], one of each of ``count`` equally likely intervals."""
    part = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    return torch.sigmoid(torch.special.ndtri(part.clamp(1e-4, 1 - 1e-4)))


def flow_loss(
    pipe,
    kind,
    latents: torch.Tensor,
    tokens: dict[str, torch.Tensor],
    shift: float,
    level: torch.Tensor | None = None,
    predict: Callable = velocity,
) -> torch.Tensor:
    """Rectified flow: regress noise - latents at logit-normal (or given), shifted noise levels.

    ``predict`` is called like :func:`velocity`.
    """
    text, pooled = tiny_models.encode_text(pipe, tokens)
    noise = torch.randn_like(latents)
    if level is None:
        level = torch.sigmoid(torch.randn(latents.shape[0], device=latents.device))
    sigma = shifted(level, shift)
    s = sigma.view(-1, *[1] * (latents.ndim - 1))
    out = predict(pipe, kind, (1 - s) * latents + s * noise, sigma, text, pooled, tokens["mask"])
    return ((out.float() - (noise - latents)) ** 2).mean()


@torch.no_grad()
def sample(
    pipe,
    kind,
    shape: tuple[int, ...],
    tokens: dict[str, torch.Tensor],
    shift: float,
    steps: int = 20,
    seed: int = 0,
    predict: Callable = velocity,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """Pixels in [-1, 1] by Euler steps at a stage's own size (previews of a run).

    ``sigmas`` are noise levels, 0 the last, in the place of ``steps`` levels shifted by ``shift``.
    """
    device = tokens["text"].device
    gen = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(shape, generator=gen).to(device)
    text, pooled = tiny_models.encode_text(pipe, tokens)
    if sigmas is None:
        sigmas = shifted(torch.linspace(1, 0, steps + 1), shift).tolist()
    for now, after in itertools.pairwise(sigmas):
        sigma = torch.full(shape[:1], now, device=device)
        out = predict(pipe, kind, latents, sigma, text, pooled, tokens["mask"])
        latents = latents + (after - now) * out.float()
    config = pipe.vae.config
    return pipe.vae.decode(
        latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    ).sample.float()
