"""How much work tuning does, and what it finds for one number of computed steps."""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.engine import Recipe
from flashomni.tuning.layer_tries import Divided
from flashomni.tuning.sparse import OPTIONS, Spent
from flashomni.tuning.validate import Verdict


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much work tuning may do.

    Args:
        tries: schedules tried on the real output for each number of computed steps, beside those
            that planning proposes.
        starts: of what planning proposes, so many are measured: the ramp, with fitted weights and
            with the presets' forecast, and the plan first.
        probes: steps at which gains are measured.
        probed: prompts that gains are measured on, in turn.
        sparse: of the kinds of sparse attention that steps may be computed with, so many are tried;
            see :mod:`flashomni.tuning.sparse`.
        layer_runs: generations that measure what sparse attention loses in runs of layers, for each
            number of computed steps; 0 tries kinds in all layers alone.
        groups: of layers that may be computed in steps of their own: kinds of layers, and halves of
            the longest where there are fewer kinds; 0 leaves them together, and tries no tiles in
            Dispatch steps either. See :mod:`flashomni.tuning.layer_tries`.
        memory: bytes that recordings may take in host memory.
    """

    tries: int = 4
    starts: int = 6
    probes: int = 8
    probed: int = 2
    sparse: int = len(OPTIONS)
    layer_runs: int = 32
    groups: int = 2
    memory: int = 8 << 30


@dataclass(frozen=True)
class Point:
    """What was found for one number of computed steps.

    Attributes:
        computed: number of steps that are computed.
        recipe: the tuned recipe.
        source: which stage proposed its schedule.
        predicted_db: of the final latents, mean over the tuning prompts.
        measured_db: likewise, on the real output.
        verdict: on held-back prompts, in pixels.
        spent: what sparse attention in computed steps was worth; ``None`` where it was not tried:
            it is not where it does not pay with fewer computed steps.
        divided: what groups of layers with steps of their own were worth; ``None`` likewise.
    """

    computed: int
    recipe: Recipe
    source: str
    predicted_db: float
    measured_db: float
    verdict: Verdict
    spent: Spent | None = None
    divided: Divided | None = None
