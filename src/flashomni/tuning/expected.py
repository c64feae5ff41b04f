"""How many calls of the model tuning will make, for a progress bar: what is found needs none."""

from __future__ import annotations

from collections.abc import Sequence

from flashomni.tuning.layer_groups import LayerGroups
from flashomni.tuning.layer_tries import TILES, TRIES
from flashomni.tuning.settings import Settings
from flashomni.tuning.state import State
from flashomni.tuning.validate import WARM, ramp_steps


def expected_steps(
    state: State,
    settings: Settings,
    groups: LayerGroups,
    counts: Sequence[int],
    num_steps: int,
    probes: Sequence[Sequence[int]],
    lacks: Sequence[bool],
    held_back: int,
    compiles: bool,
) -> int:
    """Steps that will be computed, a bound for most of them.

    Args:
        state: what is known.
        settings: how much work to do.
        groups: of layers.
        counts: numbers of computed steps that are asked for.
        num_steps: of a generation.
        probes: steps whose gains are measured, of each prompt.
        lacks: of each tuning prompt, whether planning needs its recording.
        held_back: prompts.
        compiles: whether generations are run that nobody times.
    """
    prompts, found = len(lacks), 0
    missing = [count for count in counts if state.get(f"point {count}") is None]
    for number, needed in enumerate(lacks):
        recorded = state.recording(number) is not None
        seen = bool(missing) and groups.lacks(number)
        found += num_steps * (seen if recorded else needed or seen)
    for number, at in enumerate(probes):
        found += sum(num_steps - 1 - s for s in at if state.get(f"gain {number} {s}") is None)
    if missing and not groups.reached:
        found += groups.probe_calls(sorted(step for at in probes for step in at))
    asked = min(settings.probed, prompts)
    runs = WARM + 2 * asked if compiles else asked
    for count in missing:
        if count == min(counts):
            layer_runs = settings.layer_runs * bool(settings.sparse)
            found += ((settings.sparse + 1) * runs + layer_runs) * count
            found += len(TILES) * num_steps * bool(groups.parts)
        found += (TRIES + 1) * runs * count * bool(groups.parts)
        both = enumerate((*ramp_steps(count, num_steps), -1))
        replayed = next(place for place, at in both if at != place)
        found += (settings.starts + settings.tries) * prompts * (count - replayed)
        found += 3 * (held_back + WARM * compiles) * count
    return found + bool(missing) * held_back * num_steps
