"""Which step is it: schedulers, contexts and announcements that say so, and those that do not."""

from types import SimpleNamespace

import pytest
import torch
from loops import CACHING, Loop, euler, kinds

import flashomni
from conftest import ADAPTERS, STEPS, call, run
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_pipeline_with_another_scheduler_is_followed(flux):
    """The scheduler that is asked is that of the pipeline which calls."""
    model, inputs = flux
    first, second = Loop(model, euler(), inputs), Loop(model, euler(), inputs)
    with flashomni.accelerate(second, CACHING) as engine:
        alone, expected = second(12), kinds(engine)
    with flashomni.accelerate(first, CACHING) as engine:
        first(8)
        assert torch.equal(second(12), alone) and kinds(engine) == expected
        assert {step["branch"] for step in engine.report().steps} == {"call"}


def test_a_bare_transformer_follows_the_pipeline_that_calls_it(flux):
    """No engine.step needed where a pipeline is on the stack."""
    model, inputs = flux
    with flashomni.accelerate(model, CACHING) as engine:
        Loop(model, euler(), inputs)(8)
        assert len(engine.report().steps) == 8 and "d" in kinds(engine)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "CogVideoXDDIMScheduler"])
def test_schedulers_without_step_index_are_counted(flux, name):
    """Their calls of ``step`` are; nothing stays on the scheduler, a copy has its own method."""
    import copy

    import diffusers

    model, inputs = flux
    scheduler = getattr(diffusers, name)()
    assert not hasattr(scheduler, "step_index")
    loop = Loop(model, scheduler, inputs)
    with flashomni.accelerate(loop, CACHING) as engine:
        for _ in range(2):
            loop(8)
            assert [step["step"] for step in engine.report().steps] == list(range(8))
        other = copy.deepcopy(scheduler)
        assert other.step.__self__ is other
    assert "step" not in scheduler.__dict__
    with pytest.raises(ValueError, match="memory must be"):
        flashomni.accelerate(loop, CACHING, memory="much")
    assert "step" not in scheduler.__dict__


def test_a_call_by_itself_is_none_of_a_pipeline_that_was_given_up(flux):
    """Its scheduler stands in the midst of its steps, and its caches are of another picture."""
    model, inputs = flux

    class Stops(Loop):
        def __call__(self, steps=9, calls=3):
            self.scheduler.set_timesteps(steps)
            for timestep in self.scheduler.timesteps[:calls]:
                output = call(self.transformer, self.inputs)[..., :1]
                self.scheduler.step(output, timestep, output)

    other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
    stock, loop = call(model, other), Stops(model, euler(), inputs)
    with flashomni.accelerate(loop, CACHING) as engine:
        loop()
        assert not engine.finished and "d" in kinds(engine)
        for _ in range(2):
            assert torch.equal(call(model, other), stock)
        loop()
        assert "d" in kinds(engine)


def test_a_scheduler_that_never_advances_is_named(flux):
    """Pipelines that step copies of their scheduler: an error instead of endless branches."""
    model, inputs = flux

    class Stuck(Loop):
        def __call__(self):
            self.scheduler.set_timesteps(20)
            for _ in range(20):
                call(self.transformer, self.inputs)

    loop = Stuck(model, euler(), inputs)
    with (
        flashomni.accelerate(loop, CACHING),
        pytest.raises(ValueError, match=r"scheduler does not advance.*engine\.step"),
    ):
        loop()


def test_cache_contexts_that_tell_the_step_are_believed(flux):
    """diffusers' CacheContext.step_index and num_inference_steps, without any scheduler."""
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    if not hasattr(hooks, "CacheContext"):
        pytest.skip("this diffusers has no CacheContext")
    model, inputs = flux
    alone, _ = run(model, inputs, CACHING)
    with flashomni.accelerate(model, CACHING) as engine:
        latents = inputs["hidden_states"]
        for step in range(STEPS):
            with model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
                out = call(model, {**inputs, "hidden_states": latents})
            assert torch.equal(out, alone[step])
            latents = latents - 0.05 * out
        assert {s["branch"] for s in engine.report().steps} == {"cond"}


def test_announcements_are_checked():
    """Numbers out of range or of another type are named."""
    model, _ = adapters()[ADAPTERS[0]].tiny()
    with flashomni.accelerate(model.eval()) as engine:
        for step, of in ((9, 9), (-1, 4), (0, 0)):
            with pytest.raises(ValueError, match="step must be from 0"):
                engine.step(step, of)
        with pytest.raises(ValueError, match="generation must be a name"):
            engine.step(0, 4, generation=["a"])
        for step, of in ((1.0, 4), (True, 4), (0, "4")):
            with pytest.raises(ValueError, match="must be an integer"):
                engine.step(step, of)
        with pytest.raises(ValueError, match="branch must be a string"):
            engine.step(0, 4, branch=3)


def test_something_with_a_transformer_that_is_no_pipeline(flux):
    """No scheduler, no timesteps: the bare transformer's error."""
    model, inputs = flux
    holder = SimpleNamespace(transformer=model)
    with (
        flashomni.accelerate(model, CACHING),
        pytest.raises(ValueError, match="nothing tells the engine which step this is"),
    ):
        call(holder.transformer, inputs)
