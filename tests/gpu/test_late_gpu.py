"""Schedules that decide late, on a GPU: where the host waits for the device."""

import warnings

import pytest
import torch

import flashomni
from conftest import call
from flashomni.engine import Recipe
from flashomni.engine.schedules import schedules
from flashomni.models import adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 14
# Settings by which each leaves some steps out of the run below, and computes some.
SETTINGS = {
    "adaptive": {"tolerance": 0.02, "first": 2},
    "easycache": {"threshold": 0.2, "first": 2},
    "first_block": {"threshold": 0.12, "back": 1},
    "teacache": {"threshold": 0.12, "coefficients": [1.0, 0.0]},
    "magcache": {"threshold": 0.4},
}
MOST = {"easycache": 1, "first_block": 1, "teacache": 1}  # waits in a step that may be left out


def waits(model, inputs):
    """``(output, how often the host waited)`` of one call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = call(model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return output, sum("synchronizing" in str(warning.message) for warning in seen)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(schedules()))
def test_the_host_waits_only_where_a_probe_is_read(name):
    """Never in the first step and the last; elsewhere as often as the page of methods says."""
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    model = model.eval().cuda()
    inputs = {key: value.cuda() for key, value in inputs.items()}
    made = Recipe.of(
        "taylorseer", level="layers", schedule={"name": name, **SETTINGS.get(name, {})}
    )
    with flashomni.accelerate(model, made) as engine:
        for _ in range(2):  # nothing is compiled or allocated for the first time in the second
            latents, counts = inputs["hidden_states"], []
            for step in range(STEPS):
                engine.step(step, STEPS)
                output, count = waits(model, {**inputs, "hidden_states": latents})
                latents = latents - 0.1 * output
                counts.append(count)
        kinds = [step["kind"] for step in engine.report().steps]
    assert "dispatch" in kinds and latents.isfinite().all()
    assert counts[0] == counts[-1] == 0
    assert max(counts) <= MOST.get(name, 0)
