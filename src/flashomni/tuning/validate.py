"""The tuned recipe against the ramp, on prompts that tuning did not see, through the engine."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from flashomni.engine import Recipe
from flashomni.engine.schedules.ramp import Ramp
from flashomni.engine.tuned_on import TunedOn, fingerprint, prompts_hash
from flashomni.lab import metrics
from flashomni.lab.generation import Generation
from flashomni.lab.zoo import Loaded
from flashomni.models import accelerate
from flashomni.policies import make_policy
from flashomni.tuning.cost import as_fitted
from flashomni.tuning.drive import Outline
from flashomni.tuning.plan import Steps
from flashomni.tuning.polish import Candidate, spread
from flashomni.util.files import write_bytes

WARM = 2  # generations on a GPU that nobody times: kernels compile, graphs are recorded
# What the presets forecast with, and the ramp that is to be beaten.
BASE, BASE_ORDER = "quadrature", 2
KINDS = ("dense", "ramp", "tuned")  # pictures of a point
NOTHING: Callable[[int, int], None] = lambda step, total: None  # noqa: E731


def ramp_steps(computed: int, num_steps: int) -> Steps:
    """The ramp of as many computed steps."""
    return Ramp(computed, num_steps).steps()


def recipe_of(
    steps: Steps, num_steps: int, candidate: Candidate | None = None, name: str = "ramp"
) -> Recipe:
    """A recipe that computes these steps and forecasts the output in between.

    Args:
        steps: computed.
        num_steps: of the generation.
        candidate: whose forecast to take; the presets' if left out.
        name: of the recipe.
    """
    forecast: dict[str, Any] = {"name": BASE, "layer_order": BASE_ORDER, "level": "output"}
    if candidate is not None:
        forecast |= {"name": candidate.forecast, "layer_order": candidate.order}
        if candidate.forecast == "fitted":
            forecast["fitted"] = asdict(
                as_fitted(candidate.weights, candidate.steps, candidate.order)
            )
    made = Recipe(name=name, policy=make_policy("cached"))
    made = made.replace(
        schedule={"name": "steps", "steps": list(steps), "of": num_steps, "min_steps": 0},
        degrade_below=1.0,
        order=0,
    )
    return made.replace(forecast=forecast)


@dataclass(frozen=True)
class Held:
    """What one held-back prompt gave under one recipe.

    Attributes:
        psnr_db: against the stock pipeline; 99 where the frames are identical.
        seconds: of the whole call of the pipeline.
        dense_seconds: of the stock pipeline's.
    """

    psnr_db: float
    seconds: float
    dense_seconds: float


class HeldBack:
    """Prompts that are kept back, and the stock pipeline's pictures of them.

    Args:
        pipe: the pipeline.
        call: arguments of its call.
        prompts: that tuning does not see.
        seeds: of their noise.
        on_steps: told how many calls of the model a run would have computed.
    """

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        prompts: list[str],
        seeds: list[int],
        on_steps: Callable[[int], None],
    ) -> None:
        self.prompts = prompts
        loaded = Loaded(pipe, prompts[0], call)
        self._generations = [
            Generation(loaded, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        self._dense: list[tuple[Tensor, float]] = []
        self._on_steps = on_steps

    def dense(self) -> list[tuple[Tensor, float]]:
        """Frames and seconds of the stock pipeline; run once."""
        if not self._dense:
            self._generations[0].warm_up()
            for generation in self._generations:
                self._dense.append(generation.run(NOTHING))
                self._on_steps(generation.num_steps)
        return self._dense

    def run(self, recipe: Recipe, computed: int) -> tuple[list[Held], Tensor]:
        """All held-back prompts under a recipe, and the frames of the first."""
        dense, found, pictures = self.dense(), [], []
        first = self._generations[0]
        with accelerate(first.pipe, recipe):  # graphs as they will be
            for _ in range(WARM if first.compiles else 0):
                first.discard()
                self._on_steps(computed)
            for generation, (reference, dense_seconds) in zip(
                self._generations, dense, strict=True
            ):
                pixels, seconds = generation.run(NOTHING)
                decibel = min(metrics.psnr(reference, pixels), 99.0)
                found.append(Held(round(decibel, 3), seconds, dense_seconds))
                pictures.append(pixels)
                self._on_steps(computed)
        return found, pictures[0]


def picture_path(folder: Path, computed: int, kind: str) -> Path:
    """Where a point's picture lies."""
    return folder / f"{computed}-{kind}.png"


def keep_picture(pixels: Tensor, path: Path) -> None:
    """The middle frame of ``[F, 3, H, W]`` as a PNG."""
    frame = pixels[len(pixels) // 2].nan_to_num(0.0, 1.0, 0.0)
    values = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(values).save(content, format="PNG")
    write_bytes(path, content.getvalue())


@dataclass(frozen=True)
class Verdict:
    """A tuned recipe against the ramp, on held-back prompts.

    Attributes:
        psnr_db: mean of the tuned recipe, ``worst_db`` its lowest.
        ramp_db: mean of the ramp with the presets' forecast, ``ramp_worst_db`` its lowest.
        gain_db: mean of the paired differences, ``error_db`` its standard error; ``None`` of one
            prompt.
        same_weights_db: mean of the ramp with weights fitted in the same way; ``None`` where the
            tuned schedule is the ramp's.
        schedule_gain_db: mean of the paired differences to that ramp, ``schedule_error_db`` its
            standard error: what the schedule alone is worth. ``None`` likewise.
        speedup: measured, median.
    """

    psnr_db: float
    worst_db: float
    ramp_db: float
    ramp_worst_db: float
    gain_db: float
    error_db: float | None
    same_weights_db: float | None
    schedule_gain_db: float | None
    schedule_error_db: float | None
    speedup: float

    @property
    def beats(self) -> bool:
        """Whether the recipe may be written: neither forecast makes the ramp as good."""
        return self.gain_db > 0 and (self.schedule_gain_db is None or self.schedule_gain_db > 0)

    @property
    def gain(self) -> str:
        """``gain_db`` and its error, in words."""
        error = "" if self.error_db is None else f" ± {self.error_db:.2f}"
        return f"{self.gain_db:+.2f}{error}"

    @classmethod
    def of(cls, tuned: list[Held], ramp: list[Held], same_weights: list[Held] | None) -> Verdict:
        """From what the prompts gave, in the same order."""
        own, others = [x.psnr_db for x in tuned], [x.psnr_db for x in ramp]
        gains = [a - b for a, b in zip(own, others, strict=True)]
        same, over_same = None, None
        if same_weights is not None:
            same = [x.psnr_db for x in same_weights]
            over_same = [a - b for a, b in zip(own, same, strict=True)]
        return cls(
            psnr_db=round(statistics.fmean(own), 2),
            worst_db=round(min(own), 2),
            ramp_db=round(statistics.fmean(others), 2),
            ramp_worst_db=round(min(others), 2),
            gain_db=round(statistics.fmean(gains), 2),
            error_db=_rounded(spread(gains)),
            same_weights_db=None if same is None else round(statistics.fmean(same), 2),
            schedule_gain_db=None if over_same is None else round(statistics.fmean(over_same), 2),
            schedule_error_db=None if over_same is None else _rounded(spread(over_same)),
            speedup=round(statistics.median(x.dense_seconds / x.seconds for x in tuned), 2),
        )

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Verdict:
        return cls(**value)


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(error, 2)


def tuned_on(
    model: nn.Module, outline: Outline, prompts: Sequence[str], count: int, verdict: Verdict
) -> TunedOn:
    """What a recipe remembers of its tuning."""
    return TunedOn(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        num_steps=outline.num_steps,
        latents=outline.latents,
        prompts=prompts_hash(prompts),
        count=len(prompts),
        ramp=f"ramp:computed={count},of={outline.num_steps}",
        gain_db=verdict.gain_db,
    )
