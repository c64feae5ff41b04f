"""Calls of the model that end with an exception, or with Ctrl-C: what follows is as if they had not
been made."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch

import flashomni
from conftest import SPARSE, STEPS, call, first_item, generation, run
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")
EVERY = "taylorseer:interval=3,warmup=.2,level=layers"


class Fails:
    """A model with a last layer that raises when it is told to."""

    def __init__(self, name="FluxTransformer2DModel"):
        torch.manual_seed(0)
        self.model, inputs = adapters()[name].tiny()
        self.inputs, self.error = first_item(inputs), None
        stock, outer = type(self.model.eval().proj_out), self

        class Raises(stock):
            def forward(self, x):
                if outer.error is not None:
                    raise outer.error
                return super().forward(x)

        self.model.proj_out.__class__ = Raises

    def fail(self, error):
        self.error = error
        try:
            with pytest.raises(type(error)):
                call(self.model, self.inputs)
        finally:
            self.error = None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("recipe", [EVERY, "adaptive_guidance"], ids=["layers", "output"])
def test_the_next_generation_is_that_of_a_fresh_engine(recipe, error):
    """Wherever torch tells nobody that a call is over: it runs its hooks for errors alone."""
    made = Fails()
    expected, _ = run(made.model, made.inputs, recipe, 4)
    with flashomni.accelerate(made.model, recipe) as engine:
        for step in range(2):
            engine.step(step, 4)
            call(made.model, made.inputs)
        engine.step(2, 4)
        made.fail(error())
        assert not engine.running
        assert [step["step"] for step in engine.report().steps] == [0, 1]
        assert torch.equal(generation(engine, made.model, made.inputs, 4), expected)


@pytest.mark.slow
def test_an_interrupt_before_the_model_runs():
    """Weights may be on their way to the device for seconds, in hooks in front of it."""
    made = Fails()
    with flashomni.accelerate(made.model, EVERY) as engine:
        engine.step(0, 4)
        with interrupted(made.model):
            call(made.model, made.inputs)
        expected = generation(engine, made.model, made.inputs, 4)
        engine.step(0, 4)
        thread = threading.Thread(target=quietly, args=(made.model, made.inputs))
        thread.start()
        thread.join()  # it announced nothing, and is gone
        assert torch.equal(generation(engine, made.model, made.inputs, 4), expected)


@contextlib.contextmanager
def interrupted(model):
    """Ctrl-C in a hook behind the engine's."""

    def hook(*_):
        raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def quietly(model, inputs):
    flashomni.engine_of(model).step(0, 4, generation="of a thread")
    with torch.no_grad(), interrupted(model):
        call(model, inputs)


@pytest.mark.slow
def test_nothing_is_kept_of_a_call_that_was_left():
    """Of one that was interrupted before it ran, whose caches the engine would hold for ever."""
    made = Fails()
    engine = flashomni.accelerate(made.model, EVERY)
    for step in range(3):
        engine.step(step, 4)
        call(made.model, made.inputs)
    (branch,) = engine._runtime.last.branches.values()
    kept = weakref.ref(branch.groups[0].spans)
    assert engine._runtime.last.nbytes()[0] > 0
    del branch
    engine.step(3, 4)
    with interrupted(made.model):
        call(made.model, made.inputs)
    engine.remove()
    gc.collect()
    assert kept() is None and not engine.running


@pytest.mark.slow
@pytest.mark.parametrize("branches", [(None,), ("cond", "uncond")])
@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_failed_may_be_made_again(branches, at):
    """It was announced twice, and happened once: in the same branch, which computes it."""
    made = Fails()
    with flashomni.accelerate(made.model, SPARSE) as engine:
        for step in range(STEPS):
            for branch in branches:
                if step == at and branch == branches[-1]:
                    engine.step(step, STEPS, branch)
                    made.fail(RuntimeError())
                engine.step(step, STEPS, branch)
                call(made.model, made.inputs)
        report = engine.report()
        steps = [(each["step"], each["branch"]) for each in report.steps]
        assert steps == [(i, branch or "call") for i in range(STEPS) for branch in branches]
        assert len(engine._runtime.last.branches) == len(branches)


@pytest.mark.slow
def test_a_step_that_failed_may_be_left_out():
    """Or it is gone over, and the steps behind it keep their numbers."""
    made = Fails()
    with flashomni.accelerate(made.model, SPARSE) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS)
            if step == 4:
                made.fail(RuntimeError())
            else:
                call(made.model, made.inputs)
        kinds = {each["step"]: each["kind"] for each in engine.report().steps}
    assert list(kinds) == [0, 1, 2, 3, 5, 6, 7, 8, 9] and kinds[5] == "update"
