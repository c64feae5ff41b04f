"""One picture or video against the stock pipeline's: what `eval` and `compare` both measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flashomni.lab import metrics
from flashomni.lab.fidelity.measures import Measure

CAP_DB = 120.0  # of identical pictures, so that means exist


@dataclass(frozen=True)
class Judged:
    """How far a picture is from its reference.

    Attributes:
        psnr_db: at most ``CAP_DB``, which identical pictures have; ``None`` after a failure.
        ssim: mean over frames; ``None`` where they are too small, or after a failure.
        temporal_db: PSNR of the changes from frame to frame, at most ``CAP_DB``; of videos.
        measures: scores that were asked for, by name; none after a failure.
        failure: why nothing can be said of the picture, or ``None``.
        identical: whether every value is equal, which ``CAP_DB`` does not say.
    """

    psnr_db: float | None
    ssim: float | None
    temporal_db: float | None
    measures: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    identical: bool = False


def judged(
    reference: Tensor,
    pixels: Tensor,
    names: tuple[str, str],
    prompt: str,
    scores: Mapping[str, Measure],
) -> Judged:
    """Measure a picture.

    Args:
        reference: the stock pipeline's, fp32 ``[F, 3, H, W]`` in [0, 1]; F is 1 for pictures.
        pixels: the method's, likewise.
        names: of the two, for the reason of a failure.
        prompt: that they are of.
        scores: measures beside PSNR and SSIM.

    Raises:
        ValueError: shapes differ or are empty.
    """
    distance = metrics.compare(reference, pixels, names)
    if distance.psnr_db is None and not distance.identical:
        return Judged(None, distance.ssim, None, failure="; ".join(distance.notes))
    temporal = None
    if len(pixels) > 1:
        temporal = min(metrics.temporal_psnr(reference, pixels), CAP_DB)
    return Judged(
        CAP_DB if distance.psnr_db is None else min(distance.psnr_db, CAP_DB),
        distance.ssim,
        temporal,
        {name: score(reference, pixels, prompt) for name, score in scores.items()},
        identical=distance.identical,
    )
