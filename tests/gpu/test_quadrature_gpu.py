"""Forecast quadrature on a GPU: the noise levels come to the host, and no step waits for them."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import flashomni
from flashomni.engine import Recipe
from flashomni.engine.noise import Noise
from flashomni.lab import zoo

pytestmark = pytest.mark.gpu


def test_noise_is_sent_without_waiting():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise = Noise.of(scheduler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scheduler.sigmas.zero_()  # behind the copy, in the stream's order
    expected = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected.set_timesteps(8)
    assert noise.levels() == pytest.approx(expected.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("graphs", [False, "auto"])
def test_an_engine_forecasts_with_the_same_weights_as_on_a_cpu(graphs):
    """Second and later generations too, whose steps may be replayed, and at other noise levels."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        recipe = Recipe.of("hicache:computed=6,of=12,forecast=quadrature")
        with flashomni.accelerate(pipe, recipe, graphs=graphs if device == "cuda" else False):
            for steps in (12, 12, 12, 16):
                noise = torch.Generator().manual_seed(0)
                size = {"height": 64, "width": 64, "num_inference_steps": steps}
                with torch.no_grad():
                    made = pipe("a ring", **size, generator=noise, output_type="latent")[0]
                found.append(made.float().cpu())
    for cpu, cuda in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=2e-2, atol=2e-2)
