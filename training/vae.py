"""Trains the small autoencoders and fits their latents to unit variance.

First encoder and decoder together (L1 and L2, a very small KL term). Then the latents are made
zero-mean and unit-variance for each channel by folding the affine map into the last encoder and
the first decoder convolution, and the decoder alone finishes on those latents.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F

from training.data import Renderer, Source, encode

KL_WEIGHT = 1e-4


def _clip_times(step: int) -> torch.Tensor:
    """Single frames, 17 neighbouring frames and 17 frames of the whole motion, in turn."""
    if step % 4 == 0:
        return torch.zeros(1)
    if step % 4 == 1:
        return torch.linspace(0, 1, 17)
    first = float(torch.rand(())) * 48 / 64
    return first + torch.arange(17) / 64


def _pixels(source: Source, renderer: Renderer, step: int, small: bool) -> torch.Tensor:
    kind = source.kind
    if kind.video:
        times = _clip_times(step)
        group = 2 if small else (128 if times.shape[0] == 1 else 16)
        pixels = renderer(source.take(group)[0], 32 if small else kind.size, times)
        edge = 32 if small else 64  # crops: four times as many steps in the same time
        y, x = (int(torch.randint(pixels.shape[-1] - edge + 1, ())) for _ in range(2))
        return pixels[..., y : y + edge, x : x + edge].contiguous()
    size, group = ((256, 32), (128, 96), (256, 32), (64, 256))[step % 4]
    size, group = (32, 2) if small else (size, group)
    return renderer(source.take(group)[0], size, None)


def _ends(vae) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The linear maps next to the latents, on the encoder's and on the decoder's side."""
    if hasattr(vae, "quant_conv") and vae.quant_conv is not None:
        return vae.quant_conv, vae.post_quant_conv
    return vae.encoder.conv_out, vae.decoder.conv_in


@torch.no_grad()
def whiten(vae, latents: torch.Tensor) -> None:
    """Fold per-channel standardisation of ``latents`` [B, C, ...] into the autoencoder."""
    dims = [d for d in range(latents.ndim) if d != 1]
    mean, std = latents.mean(dims), latents.std(dims)
    std = std.maximum(0.3 * std.max())  # a channel that carries little stays small
    last, first = _ends(vae)
    channels = mean.shape[0]
    shape = (-1,) + (1,) * (last.weight.ndim - 1)
    last.bias[:channels] = (last.bias[:channels] - mean) / std
    last.weight[:channels] /= std.view(shape)
    last.bias[channels:] -= 2 * std.log()  # the log-variance follows
    inner = first.weight.flatten(2).sum(2)
    first.bias += inner @ mean
    first.weight *= std.view((1, -1) + (1,) * (first.weight.ndim - 2))


def train_vae(
    pipe, source: Source, renderer: Renderer, minutes: float, small: bool, report
) -> float:
    """Train ``pipe.vae`` for ``minutes``; returns the PSNR in dB of the last reconstructions."""
    vae, device = pipe.vae, source.device
    vae.requires_grad_(True)
    params = list(vae.parameters())
    optimiser = torch.optim.AdamW(
        params, lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3, fused=device == "cuda"
    )
    for first in range(4):  # compile and tune every size before the clock starts
        encode(vae, _pixels(source, renderer, first, small))
    begin, step, whitened, errors = time.time(), 0, False, []
    while (done := (time.time() - begin) / (60 * minutes)) < 1:
        if done > 0.65 and not whitened:
            whiten(
                vae, torch.cat([encode(vae, _pixels(source, renderer, 2, small)) for _ in range(8)])
            )
            vae.encoder.requires_grad_(False)
            _ends(vae)[0].requires_grad_(False)
            whitened = True
        rate = (
            2e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        optimiser.param_groups[0]["lr"] = rate
        pixels = _pixels(source, renderer, step, small)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            spread = posterior.std * torch.randn_like(posterior.std)
            latents = posterior.mean + (0.02 * torch.randn_like(spread) if whitened else spread)
            output = vae.decode(latents).sample
        error = F.mse_loss(output.float(), pixels)
        loss = F.l1_loss(output.float(), pixels) + 2 * error
        loss = (
            loss
            + KL_WEIGHT
            * 0.5
            * (
                posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
            ).mean()
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        optimiser.step()
        errors = [*errors[-40:], error.detach()]
        if step % 100 == 0:
            report(f"vae step {step} loss {loss.item():.4f} psnr {_psnr(errors):.2f} dB")
        step += 1
    vae.requires_grad_(False)
    latents = torch.cat([encode(vae, _pixels(source, renderer, 2, small)) for _ in range(8)])
    scale = 1 / latents.std().item()
    change = {"scaling_factor": vae.config.scaling_factor * scale}
    if not source.kind.video:
        change["shift_factor"] = latents.mean().item() / vae.config.scaling_factor
    vae.register_to_config(**change)
    report(f"vae done: {step} steps, psnr {_psnr(errors):.2f} dB, {change}")
    return _psnr(errors)


def _psnr(errors: list[torch.Tensor]) -> float:
    mean = torch.stack(errors).mean().item()
    return 10 * math.log10(4 / max(mean, 1e-12))  # pixels span [-1, 1]
