"""What tuning measures of sparse attention on a GPU, where graphs are recorded and replayed."""

import pytest
import torch

from flashomni.lab import zoo
from flashomni.tuning import sparse
from flashomni.tuning.drive import Driver
from flashomni.tuning.record import record
from flashomni.tuning.spending import Spending
from flashomni.tuning.state import State
from flashomni.tuning.validate import ramp_steps, recipe_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("option", sparse.OPTIONS[: sparse.FAMILIES], ids=sparse.in_short)
def test_what_is_timed_with_graphs_is_what_a_first_generation_gives(option, tmp_path):
    """dB of the generations that are timed, and of one without graphs that is not."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=64, dual=1, single=1)
    loaded.call.update(height=320, width=320, num_inference_steps=8)
    loaded.pipe.to("cuda", torch.bfloat16)
    driver = Driver(loaded.pipe, loaded.call)
    recording = record(driver, "a red circle", 0)
    plan = recipe_of(ramp_steps(6, 8), 8)
    prompts, told = [("a red circle", 0)], []
    spending = Spending(
        driver, State(tmp_path, {}), plan, prompts, lambda _: recording.latents,
        lambda: told.append(1),
    )  # fmt: skip
    plain = spending.run(plan, lambda levels, seconds: False)
    group = {"layers": ":", **option}
    recipe = sparse.sparsely(plan, [group])
    found = spending.run(recipe, lambda levels, seconds: False)
    assert found.apart[0] < 120 and found.seconds > 0 and min(found.skipped) > 0
    assert spending.apart(recipe) == pytest.approx(found.apart[0], abs=0.5)
    assert plain.levels[0] > found.levels[0] - 6 and len(told) > 2
