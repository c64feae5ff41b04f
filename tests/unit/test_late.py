"""Schedules that decide at the start of a step, or inside it, through the whole engine."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import flashomni
from conftest import STEPS, call, generation
from flashomni.engine import Recipe, Schedule, StepKind
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclass(frozen=True)
class Drift(Schedule):
    """Computes when the input has moved by more than ``least`` since it last did."""

    name: ClassVar[str] = "drift"
    least: float = 0.2

    def kind(self, step, num_steps, signals):
        now = signals.latents
        last = signals.memory.get("input")
        if last is None or step == num_steps - 1:
            moved = True
        else:
            moved = float((now - last).norm() / last.norm()) > self.least
        if not moved:
            return StepKind.DISPATCH
        signals.memory["input"] = now
        return StepKind.UPDATE


@dataclass(frozen=True)
class Front(Schedule):
    """Runs the first block in every step and decides by what it returns, or by the step."""

    name: ClassVar[str] = "front"
    decides: ClassVar[bool] = True
    front: int = 1
    back: int = 1
    every: int = 3

    def kind(self, step, num_steps, signals):
        return StepKind.UPDATE if step == 0 else StepKind.DISPATCH

    def decide(self, layer, signals):
        assert layer == self.front and {stream.ndim for stream in signals.streams} == {3}
        return signals.step % self.every == 0


def recipe(schedule):
    cached = Recipe.of(make_policy("cached"), degrade_below=1.0, layer_order=1)
    return cached.replace(schedule=schedule)


def test_a_schedule_may_decide_late(tiny):
    """By the model's input; what it remembers lives as long as the branch."""
    model, inputs = tiny
    with flashomni.accelerate(model, recipe(Drift())) as engine:
        moving = generation(engine, model, inputs)
        kinds = [step["kind"] for step in engine.report().steps]
        assert kinds[0] == "update" and kinds[-1] == "update" and "dispatch" in kinds
        assert torch.equal(generation(engine, model, inputs), moving)
        for index in range(STEPS):  # nothing moves: nothing is computed but the ends
            engine.step(index, STEPS)
            call(model, inputs)
        still = [step["kind"] for step in engine.report().steps]
    assert still == ["update", *["dispatch"] * (STEPS - 2), "update"]


def test_a_schedule_may_decide_inside_a_step(tiny):
    """Front and back blocks are computed in every step, the others when it says so."""
    model, inputs = tiny
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe(Front())) as engine:
        for index in range(STEPS):
            engine.step(index, STEPS)
            torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
        steps = engine.report().steps
    for index, step in enumerate(steps):
        first, *inner, last = step["layer_kinds"]
        assert (first, last) == ("full", "full")
        assert set(inner) == ({"update"} if index % 3 == 0 else {"bypass"})
        assert step["kind"] == ("update" if index % 3 == 0 else "dispatch")


def test_decisions_inside_a_step_do_not_go_with_the_output_level():
    """Running the first blocks is what the output level leaves out."""
    with pytest.raises(ValueError, match="decides inside a step"):
        recipe(Front()).replace(level="output")


def test_branches_follow_the_first_one_that_asks(tiny):
    """cond and uncond of one step do the same."""
    model, inputs = tiny
    with flashomni.accelerate(model, recipe(Drift())) as engine:
        latents = inputs["hidden_states"]
        for index in range(STEPS):
            for branch in ("cond", "uncond"):
                engine.step(index, STEPS, branch)
                out = call(model, {**inputs, "hidden_states": latents})
            latents = latents - 0.05 * out
        steps = engine.report().steps
    cond, uncond = ([s["kind"] for s in steps if s["branch"] == b] for b in ("cond", "uncond"))
    assert cond == uncond and "dispatch" in cond
