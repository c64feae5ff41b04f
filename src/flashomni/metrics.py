"""How far two pictures or videos are apart. Knows only tensors ``[F, 3, H, W]`` in [0, 1].

F is the number of frames, 1 for a picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SSIM_WINDOW = 11


def psnr(reference: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all frames; infinite for equal inputs.

    Raises:
        ValueError: shapes differ, or a value is not a finite number in [0, 1].
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


def max_abs_diff(reference: Tensor, image: Tensor) -> float:
    """Largest difference of a channel of a pixel, 0 to 1.

    Raises:
        ValueError: as :func:`psnr`.
    """
    _check(reference, image)
    return float((reference.float() - image.float()).abs().max())


def _check(reference: Tensor, image: Tensor) -> None:
    for name, tensor in (("reference", reference), ("image", image)):
        if tensor.ndim != 4 or tensor.shape[1] != 3:
            raise ValueError(f"{name} must be [F, 3, H, W], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")
        low, high = float(tensor.min()), float(tensor.max())
        if not (low >= 0.0 and high <= 1.0):  # also false for NaN
            raise ValueError(f"{name} must lie in [0, 1], got values from {low} to {high}")
    if reference.shape != image.shape:
        raise ValueError(f"image must be {list(reference.shape)}, got {list(image.shape)}")
