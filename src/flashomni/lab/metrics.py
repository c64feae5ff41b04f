"""How far two pictures or videos are apart. Knows only tensors ``[F, 3, H, W]`` in [0, 1].

F is the number of frames, 1 for a picture.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SSIM_WINDOW = 11
LPIPS_PIXELS = 32  # AlexNet's convolutions leave nothing of fewer
ALEXNET = "alexnet-owt-7be5be79.pth"


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames; infinite for equal inputs.

    Raises:
        ValueError: shapes differ or are empty, or a value is not a finite number in [0, 1].
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(reference, image)
    if torch.equal(reference, image):
        return math.inf
    return float(peak_signal_noise_ratio(image.float(), reference.float(), data_range=1.0))


def ssim(reference: Tensor, image: Tensor) -> float:
    """Structural similarity, mean over frames; 1 for equal inputs.

    Raises:
        ValueError: as :func:`psnr`; or frames are smaller than the 11 x 11 window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(reference, image)
    height, width = reference.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"reference must have at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels for SSIM, "
            f"got {height} x {width}"
        )
    return float(
        structural_similarity_index_measure(image.float(), reference.float(), data_range=1.0)
    )


def temporal_psnr(reference: Tensor, image: Tensor) -> float:
    """PSNR in dB of the changes from frame to frame: how faithfully things move and do not flicker.

    A constant error in all frames does not count here. Infinite for equal changes.

    Raises:
        ValueError: as :func:`psnr`; or there is only one frame.
    """
    _check(reference, image)
    if len(reference) < 2:
        raise ValueError(f"reference must have at least 2 frames, got {len(reference)}")
    gap = reference.float().diff(dim=0) - image.float().diff(dim=0)
    error = float(gap.square().mean())
    return -10.0 * math.log10(error) if error else math.inf


def why_no_lpips() -> str | None:
    """Why :func:`lpips` cannot run here, or ``None``. Nothing is ever downloaded."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision, which holds LPIPS' backbone, is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    return None if weights.exists() else f"torchvision's weights {ALEXNET} are not on this machine"


def lpips(reference: Tensor, image: Tensor) -> float:
    """Learned perceptual distance (AlexNet), mean over frames; 0 for equal inputs.

    Raises:
        ValueError: as :func:`psnr`.
        NotImplementedError: its weights are not on this machine; :func:`why_no_lpips` says why.
    """
    _check(reference, image)
    why = why_no_lpips()
    if why is not None:
        raise NotImplementedError(f"LPIPS cannot be measured: {why}")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    return float(
        learned_perceptual_image_patch_similarity(
            image.float(), reference.float(), net_type="alex", normalize=True
        )
    )


def why_no_flip() -> str | None:
    """Why :func:`flip` cannot run here, or ``None``."""
    missing = importlib.util.find_spec("flip_evaluator") is None
    return "flip-evaluator is not installed" if missing else None


def flip(reference: Tensor, image: Tensor) -> float:
    """LDR-FLIP: the difference that is seen when both alternate, mean over pixels and frames.

    0 for equal inputs, at most 1; at 67 pixels per degree of the field of view (Andersson et al.,
    FLIP: A Difference Evaluator for Alternating Images, 2020).

    Raises:
        ValueError: as :func:`psnr`.
        NotImplementedError: flip-evaluator is not installed.
    """
    return float(flip_map(reference, image).mean())


def flip_map(reference: Tensor, image: Tensor) -> Tensor:
    """FLIP of each pixel: fp32 ``[F, H, W]`` on the CPU, 0 to 1.

    Raises:
        ValueError: as :func:`psnr`.
        NotImplementedError: flip-evaluator is not installed.
    """
    _check(reference, image)
    why = why_no_flip()
    if why is not None:
        raise NotImplementedError(f"FLIP cannot be measured: {why}")
    from flip_evaluator import evaluate

    maps = []
    for one, other in zip(reference, image, strict=True):
        pair = (x.float().cpu().permute(1, 2, 0).contiguous().numpy() for x in (one, other))
        maps.append(torch.from_numpy(evaluate(*pair, "LDR", applyMagma=False)[0][..., 0].copy()))
    return torch.stack(maps)


def max_abs_diff(reference: Tensor, image: Tensor) -> float:
    """Largest difference of a channel of a pixel, 0 to 1.

    Raises:
        ValueError: as :func:`psnr`.
    """
    _check(reference, image)
    return float((reference.float() - image.float()).abs().max())


@dataclass(frozen=True)
class Distance:
    """How far an image is from its reference; ``None`` where it is not known.

    Attributes:
        psnr_db: ``None`` also where both are identical.
        identical: every value is equal.
        ssim: mean over frames.
        max_abs_diff: largest difference of a channel of a pixel.
        notes: why something is not known, a sentence each.
    """

    psnr_db: float | None
    identical: bool
    ssim: float | None
    max_abs_diff: float | None
    notes: tuple[str, ...] = ()


def compare(reference: Tensor, image: Tensor, names: tuple[str, str]) -> Distance:
    """What can be said of a pair, also if something is wrong with it: work is not lost over it.

    Args:
        reference: ``[F, 3, H, W]`` in [0, 1], or with values that are not finite.
        image: likewise.
        names: of the two, for the notes.

    Raises:
        ValueError: shapes differ or are empty.
    """
    notes = []
    for name, tensor in zip(names, (reference, image), strict=True):
        wrong = tensor.numel() - int(tensor.isfinite().sum())
        if wrong:
            notes.append(
                f"the {name} result has {wrong} of {tensor.numel()} values that are not finite: "
                "they are shown black, and how far the results are apart is not known"
            )
    if notes:
        _check(reference.nan_to_num(0.0, 1.0, 0.0), image.nan_to_num(0.0, 1.0, 0.0))
        return Distance(None, False, None, None, tuple(notes))
    decibel, similarity = psnr(reference, image), None
    height, width = reference.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        notes.append(
            f"SSIM is not known: its window has {SSIM_WINDOW} x {SSIM_WINDOW} pixels, "
            f"the results have {height} x {width}"
        )
    else:
        similarity = ssim(reference, image)
    return Distance(
        None if math.isinf(decibel) else decibel,
        math.isinf(decibel),
        similarity,
        max_abs_diff(reference, image),
        tuple(notes),
    )


def _check(reference: Tensor, image: Tensor) -> None:
    for name, tensor in (("reference", reference), ("image", image)):
        if tensor.ndim != 4 or tensor.shape[1] != 3:
            raise ValueError(f"{name} must be [F, 3, H, W], got {list(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")
        low, high = float(tensor.min()), float(tensor.max())
        if not (low >= 0.0 and high <= 1.0):  # also false for NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low} to {high}")
    if reference.shape != image.shape:
        raise ValueError(f"image must be {list(reference.shape)}, got {list(image.shape)}")
