"""Finds the recipe that skips most while the picture stays near the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashomni import Recipe

from .sampling import Accelerated, take_off


@dataclass(frozen=True)
class Tried:
    """A recipe and what it gave.

    Args:
        spec: as it was named.
        error: relative L2 distance of its latents from the dense ones.
        skipped: share of the blocks' FLOPs that were not executed.
    """

    spec: str
    error: float
    skipped: float


def tune(
    specs: Sequence[str],
    sample: Callable[[Accelerated | None], Tensor],
    max_error: float,
    backend: str | None = None,
) -> tuple[Tried | None, list[Tried]]:
    """Try each recipe on the same noise and prompt.

    Args:
        specs: recipes, as :meth:`flashomni.Recipe.of` takes them.
        sample: runs the sampler with this on the model, ``None`` for nothing; gives latents.
        max_error: the largest distance that is allowed.
        backend: of every op; by default the best that accepts.

    Returns:
        The one within ``max_error`` that skips most, ``None`` if there is none; and all.
    """
    made = [Accelerated(Recipe.of(spec), backend) for spec in specs]  # a wrong one says so first
    dense = sample(None).double()
    tried = []
    for spec, ours in zip(specs, made, strict=True):
        got = sample(ours).double()
        assert ours.report is not None, "the sampler was run"
        error = float((got - dense).norm() / dense.norm())
        tried.append(Tried(spec, error, ours.report.flops_skipped))
    allowed = [each for each in tried if each.error <= max_error]
    return max(allowed, key=lambda each: each.skipped, default=None), tried


def sampler_of(noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: dict) -> Any:
    """``sample`` of :func:`tune` for the inputs of ComfyUI's SamplerCustomAdvanced.

    The guider's own patcher stays as it is; what was accelerated before is not, for the comparison.
    """

    def sample(ours: Accelerated | None) -> Tensor:
        trial, patcher = copy.copy(guider), guider.model_patcher.clone()
        take_off(patcher)
        trial.model_patcher = patcher if ours is None else ours.put_on(patcher)
        trial.model_options = trial.model_patcher.model_options
        samples = trial.sample(
            noise.generate_noise(latent),
            latent["samples"],
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=None,
            disable_pbar=True,
            seed=noise.seed,
        )
        return samples.detach().to("cpu", copy=True)

    return sample


def table(best: Tried | None, tried: Sequence[Tried], max_error: float) -> str:
    """What was tried, for people."""
    lines = ["recipe                                   error    FLOPs skipped"]
    for each in sorted(tried, key=lambda each: -each.skipped):
        mark = "  <- taken" if each is best else ""
        lines.append(f"{each.spec:<40} {each.error:7.4f} {each.skipped:12.1%}{mark}")
    if best is None:
        lines.append(f"none within {max_error}: the model is handed on as it is")
    return "\n".join(lines)
