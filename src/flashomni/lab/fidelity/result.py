"""One generation of an evaluation, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashomni.lab.fidelity.methods import Method


@dataclass(frozen=True)
class Case:
    """One generation: a method, a prompt, a seed."""

    method: Method
    prompt: str
    seed: int


@dataclass(frozen=True)
class Result:
    """What one generation gave, against the stock pipeline's of the same prompt and seed.

    Attributes:
        method: its name.
        family: its family.
        prompt: text.
        seed: of the initial noise.
        steps: denoising steps.
        seconds: the whole pipeline call.
        dense_seconds: the stock pipeline, mean of its runs before and after this one.
        psnr_db: ``None`` if the frames are identical, or ``failure`` says something.
        ssim: mean over frames; ``None`` where frames are too small, or after a failure.
        lpips: ``None`` where it cannot be measured.
        temporal_db: PSNR of the change from frame to frame; ``None`` for pictures, or if identical.
        caption: ``(right, all)`` statements of the prompt, or ``None`` without a scorer.
        dense_caption: the same of the stock pipeline's picture.
        flops_skipped: share of FLOPs that was not executed.
        versions: of what took part.
        bracketed: false where the campaign was stopped before the stock run after this one:
            ``dense_seconds`` is the run before it alone.
        failure: why nothing can be said of the picture, or ``None``.
        scorer: what gave the captions; ``None`` without, or while the score is owed.
        flip: mean over pixels and frames; ``None`` where it cannot be measured.
        measures: further scores that were asked for, by name.
    """

    method: str
    family: str
    prompt: str
    seed: int
    steps: int
    seconds: float
    dense_seconds: float
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    temporal_db: float | None
    caption: tuple[int, int] | None
    dense_caption: tuple[int, int] | None
    flops_skipped: float
    versions: dict[str, str]
    bracketed: bool = True
    failure: str | None = None
    scorer: str | None = None
    flip: float | None = None
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds
