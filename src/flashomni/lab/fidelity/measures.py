"""Scores beside PSNR: FLIP, LPIPS and CLIP by path, a function of yours; never a download.

A measure is ``score(reference, pixels, prompt) -> float`` with fp32 ``[F, 3, H, W]`` in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from flashomni.lab import metrics
from flashomni.lab.fidelity.scorers import load_function

Measure = Callable[[Tensor, Tensor, str], float]
Loader = Callable[[Path, torch.device], Measure]


def usual_measures() -> dict[str, str]:
    """Measures that need no weights: FLIP, where its package is there."""
    return {} if metrics.why_no_flip() is not None else {"flip": ""}


def load_measures(given: Mapping[str, str], device: torch.device) -> dict[str, Measure]:
    """Measures by name.

    Args:
        given: name -> where its weights are: ``lpips``: AlexNet's as torchvision names them, and
            its linear layers (``lin0.model.1.weight``, ...), in one .safetensors; ``clip``: a
            folder of a CLIP model of transformers; ``flip`` has no weights and takes none. Any
            other name -> ``MODULE:FUNCTION``.
        device: where they compute.

    Raises:
        ValueError: a path holds no such weights, or a function cannot be found.
        NotImplementedError: FLIP without its package; ImageReward and VBench, whose weights cannot
            be given like that.
    """
    found: dict[str, Measure] = {}
    for name, where in given.items():
        if name in REFUSED:
            raise NotImplementedError(f"{name} cannot be measured here: {REFUSED[name]}")
        why = metrics.why_no_flip()
        if name == "flip" and why is not None:
            raise NotImplementedError(f"flip cannot be measured: {why}")
        if name == "flip":
            found[name] = _flip
            continue
        if name not in LOADERS:
            found[name] = load_function(where, f"measure {name}")
            continue
        path = Path(where)
        if not path.exists():
            raise ValueError(
                f"{name} must be given by the path of its weights, which are never downloaded; "
                f"there is nothing at {where!r}"
            )
        found[name] = LOADERS[name](path, device)
    return found


def _flip(reference: Tensor, pixels: Tensor, prompt: str) -> float:
    """What flipping between two pictures shows (FLIP), mean over pixels and frames."""
    return metrics.flip(reference.cpu(), pixels.cpu())


def _clip(path: Path, device: torch.device) -> Measure:
    """Cosine of a picture and its prompt, mean over frames, times 100."""
    from transformers import CLIPModel, CLIPTokenizerFast

    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        tokenizer = CLIPTokenizerFast.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"clip: {path} holds no CLIP model in .safetensors: {error}") from error
    model = model.to(device).eval()
    side = model.config.vision_config.image_size
    longest = model.config.text_config.max_position_embeddings
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)

    @torch.no_grad()
    def score(reference: Tensor, pixels: Tensor, prompt: str) -> float:
        pixels = interpolate(pixels.to(device), (side, side), mode="bicubic", antialias=True)
        text = tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt")
        output = model(**text.to(device), pixel_values=(pixels.clamp(0, 1) - mean) / std)
        return 100 * float((output.image_embeds @ output.text_embeds.mT).mean())

    return score


def _lpips(path: Path, device: torch.device) -> Measure:
    """Learned perceptual distance (arXiv 1801.03924) with AlexNet, mean over frames."""
    network = _AlexNet()
    try:
        weights = safetensors.torch.load_file(path)
        network.load_state_dict({k: v for k, v in weights.items() if "classifier" not in k})
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"lpips: {path} does not hold its weights: {error}") from error
    network = network.to(device).eval()

    @torch.no_grad()
    def score(reference: Tensor, pixels: Tensor, prompt: str) -> float:
        return float(network(reference.to(device), pixels.to(device)).mean())

    return score


class _AlexNet(nn.Module):
    """The convolutions of AlexNet, and what LPIPS weighs the differences behind each with."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        for number, width in enumerate((64, 192, 384, 256, 256)):
            layer = nn.Module()
            layer.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{number}", layer)

    def forward(self, reference: Tensor, pixels: Tensor) -> Tensor:
        """Distance of each frame: fp32 ``[F]``."""
        total = torch.zeros(len(pixels), device=pixels.device)
        shift = torch.tensor([-0.030, -0.088, -0.188], device=pixels.device).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], device=pixels.device).view(3, 1, 1)
        mine, theirs = ((2 * x - 1 - shift) / scale for x in (pixels, reference))
        number = 0
        for layer in self.features:
            mine, theirs = layer(mine), layer(theirs)
            if isinstance(layer, nn.ReLU):
                gap = _unit(mine) - _unit(theirs)
                weighed = getattr(self, f"lin{number}").model(gap.square())
                total += weighed.mean((1, 2, 3))
                number += 1
        return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


LOADERS: dict[str, Loader] = {"clip": _clip, "lpips": _lpips}
OWN = "write a function (reference, pixels, prompt) -> float, and give it as MODULE:FUNCTION"
REFUSED = {
    "image_reward": f"its weights are a pickle, which may run code; {OWN} under another name",
    "vbench": "its dimensions load their models by address, not by path, so it would download; "
    f"save the videos and run its own command on them, or {OWN} under another name",
}
