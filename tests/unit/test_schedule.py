"""Schedules: what each step does, known before, decided at a step, or inside one."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashomni
from flashomni.engine import Recipe, StepKind
from flashomni.engine.schedules import (
    SCHEDULES,
    Plan,
    Schedule,
    Signals,
    make_schedule,
    schedule,
    schedules,
)
from flashomni.engine.schedules.interval import Interval
from flashomni.engine.schedules.steps import Steps

FULL, UPDATE, DISPATCH = StepKind.FULL, StepKind.UPDATE, StepKind.DISPATCH
RAMP = (0, 1, 2, 4, 6, 9, 13, 18, 22, 25, 27)


def rule_of_before(interval, warmup, order, num_steps):
    """Version 0.1: (kind, records, probes) of each step."""
    last, first = num_steps - 1, max(math.ceil(warmup * num_steps) - 1, 0)
    probe = max(first - order - 2, 0)
    rows = []
    for step in range(num_steps):
        since = step - first
        if step >= last or since < 0:
            kind = FULL
        elif since % interval:
            kind = DISPATCH
        else:
            kind = FULL if interval == 1 or step + 1 >= last else UPDATE
        rows.append((kind, first - order <= step < first, first > 0 and step == probe))
    return rows


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 3), st.integers(1, 80))
def test_the_interval_is_the_rule_of_before(interval, warmup, order, num_steps):
    """Same kinds always; same records and probes wherever a step dispatches, else none."""
    plan = Interval(interval, warmup).plan(num_steps, order)
    kinds, records, probes = zip(*rule_of_before(interval, warmup, order, num_steps), strict=True)
    assert plan.kinds == kinds
    if UPDATE in kinds:
        assert (plan.records, plan.probes) == (records, probes)
    else:  # nobody would read what they store
        assert not any(plan.records) and not any(plan.probes)
    assert not plan.optimistic


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(1, 9), st.floats(0, 1), st.integers(1, 60))
def test_schedule_invariants(interval, warmup, num_steps):
    """Last step dense; a Dispatch follows an Update by less than N; no Update is in vain."""
    kinds = Interval(interval, warmup).plan(num_steps, 0).kinds
    assert kinds[-1] is FULL
    since = None
    for step, kind in enumerate(kinds):
        since = 0 if kind is UPDATE else None if since is None else since + 1
        if kind is DISPATCH:
            assert since is not None and since < interval
        if kind is UPDATE:
            assert kinds[step + 1] is DISPATCH


def test_schedule_of_the_paper():
    """N = 6: warm-up, then one Update and five Dispatch steps in turn, dense end."""
    kinds = [kind.value[0] for kind in Interval(6, 0.16).plan(28, 1).kinds]
    assert "".join(kinds) == "ffff" + "uddddd" * 3 + "uddddf"


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps(num_steps):
    """As much as fits, where nothing protects short runs."""
    kinds = list(Interval(6, 0.16).plan(num_steps, 1).kinds)
    assert kinds == {1: [FULL], 2: [FULL, FULL], 4: [UPDATE, DISPATCH, DISPATCH, FULL]}[num_steps]


@pytest.mark.parametrize("made", [Interval(4, 0.16, 10), Steps(RAMP, 28, 10)])
def test_short_runs_are_protected(made):
    """Below min_steps everything is computed and nothing stored; from there on it is not."""
    for num_steps in range(1, 10):
        plan = made.plan(num_steps, 2)
        assert set(plan.kinds) == {FULL} and not any(plan.records + plan.probes)
    assert DISPATCH in made.plan(10, 2).kinds


def test_presets_protect_short_runs():
    """Four-step models run dense; the methods of papers do as their papers say."""
    for name in ("quality", "balanced", "fast"):
        assert set(Recipe.of(name).plan(4).kinds) == {FULL}
        assert DISPATCH in Recipe.of(name).plan(28).kinds
    assert DISPATCH in Recipe.of("fora").plan(4).kinds


def test_the_last_warm_up_steps_are_recorded():
    """As many as the forecast's order, right before the first Update."""
    plan = Interval(4, 0.5).plan(12, 2)
    assert [step for step in range(12) if plan.records[step]] == [3, 4]


def test_the_probe_lies_before_what_it_decides():
    """Two steps before the first recorded one where there is room; never without a warm-up."""

    def probes(warmup, num_steps, order):
        plan = Interval(4, warmup).plan(num_steps, order)
        return [step for step in range(num_steps) if plan.probes[step]]

    assert probes(0.25, 50, 2) == [8]
    assert probes(0.16, 28, 2) == [0]
    assert probes(0.16, 10, 2) == [0]
    assert probes(0.0, 28, 1) == []


def test_the_ramp_at_its_own_count():
    """Every listed step is computed, no other; a full step between Updates records too."""
    plan = Steps(RAMP, 28).plan(28, 2)
    assert [step for step in range(28) if plan.kinds[step] is not DISPATCH] == list(RAMP)
    assert plan.kinds[2] is UPDATE and plan.kinds[27] is FULL and plan.optimistic
    assert [step for step in range(28) if plan.records[step]] == [0, 1]


LISTS = st.integers(1, 60).flatmap(
    lambda of: st.tuples(
        st.just(of), st.sets(st.integers(0, of - 1)).map(lambda s: tuple(sorted({0, *s})))
    )
)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(LISTS, st.integers(1, 90))
def test_lists_at_other_counts(listed, num_steps):
    """Begins at 0, ascends, stays inside, computes as large a share; the last stays last."""
    of, steps = listed
    made = Steps(steps, of)
    found = made.resampled(num_steps)
    assert found[0] == 0 and found == sorted(set(found)) and found[-1] < num_steps
    expected = round(len(steps) * num_steps / of)
    assert len(found) == min(max(expected, min(len(steps), 2)), num_steps)
    if num_steps == of:
        assert tuple(found) == steps
    if steps[-1] == of - 1 and len(found) > 1:
        assert found[-1] == num_steps - 1
    plan = made.plan(num_steps, 1)
    assert [s for s in range(num_steps) if plan.kinds[s] is not DISPATCH] == found
    if len(steps) == of:
        assert found == list(range(num_steps))


@pytest.mark.parametrize("num_steps", [14, 20, 40, 50, 56, 100])
def test_the_shape_of_a_ramp_stays(num_steps):
    """Dense at first, then wider, then narrower again: gaps have one maximum, as listed."""
    found = Steps(RAMP, 28).resampled(num_steps)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    widest = gaps.index(max(gaps))
    assert gaps[0] == 1 and 0 < widest < len(gaps) - 1
    assert max(gaps[: len(gaps) // 4]) <= max(gaps) / 2
    for step, place in zip(found, range(len(found)), strict=True):  # where the list has that share
        at = place * (len(RAMP) - 1) / (len(found) - 1)
        low = RAMP[math.floor(at)] + (RAMP[math.ceil(at)] - RAMP[math.floor(at)]) * (at % 1)
        assert abs(step / (num_steps - 1) - low / 27) < 1.5 / (num_steps - 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": (1, 2)}, "steps must be ascending step numbers from 0 to 27"),
        ({"steps": ()}, "steps must be ascending"),
        ({"steps": (0, 2, 2)}, "steps must be ascending"),
        ({"steps": (0, 3, 2)}, "steps must be ascending"),
        ({"steps": (0, 28)}, "steps must be ascending"),
        ({"steps": (0, 1.0)}, "steps must be ascending"),
        ({"steps": (0, True)}, "steps must be ascending"),
        ({"steps": "0123"}, "steps must be ascending"),
        ({"steps": 7}, "steps must be ascending"),
        ({"of": 0}, "of must be an integer from 1"),
        ({"min_steps": -1}, "min_steps must be an integer from 0"),
    ],
)
def test_lists_that_are_none(values, message):
    """The error names the setting, what it got and what is allowed."""
    with pytest.raises(ValueError, match=message):
        make_schedule("steps", **values)


@pytest.mark.parametrize("name", sorted(schedules()))
def test_schedules_are_data(name):
    """Frozen, hashable, and the same again after JSON."""
    made = make_schedule(name)
    settings = json.loads(json.dumps(made.to_dict()))
    assert make_schedule(**settings) == made and hash(made) == hash(make_schedule(**settings))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.min_steps = 3


def test_unknown_schedules_and_settings():
    with pytest.raises(ValueError, match=r"schedule must be one of adaptive, .*steps, .*got 'tea'"):
        make_schedule("tea")
    with pytest.raises(ValueError, match=r"schedule interval takes interval, .*got 'speed'"):
        make_schedule("interval", speed=9)


def test_a_plan_of_any_steps():
    """Computed and followed by a Dispatch: Update; the others full; two before an Update record."""
    plan = Plan.of([0, 1, 2, 5, 6, 7], 10, 2)
    assert "".join(kind.value[0] for kind in plan.kinds) == "ffuddffudd"[:10]
    assert [step for step in range(10) if plan.records[step]] == [0, 1, 5, 6]
    assert [step for step in range(10) if plan.probes[step]] == [0]


@pytest.fixture
def registered():
    """Schedules of the test's own, taken off again."""

    @schedule("change")
    @dataclass(frozen=True)
    class Change(Schedule):
        """Computes when the input has moved by more than ``limit`` since the last computed step."""

        limit: float = 1.0
        of: str = "x"

        def kind(self, step, num_steps, signals):
            now = float(signals.inputs[self.of].mean())
            before = signals.memory.get("x")
            if before is None or step == num_steps - 1 or abs(now - before) > self.limit:
                signals.memory["x"] = now
                return UPDATE
            return DISPATCH

    @schedule("look")
    @dataclass(frozen=True)
    class Look(Schedule):
        """Interval 4, unless what the first layers give has changed too much."""

        decides: ClassVar[bool] = True
        front: int = 1
        back: int = 1
        tolerance: float = 0.1

        def plan(self, num_steps, order):
            return Interval(4, 0.0).plan(num_steps, order)

        def decide(self, layer, signals):
            new, old = signals.streams[0], signals.memory.get("seen")
            signals.memory["seen"] = new
            return old is not None and float((new - old).norm() / old.norm()) > self.tolerance

    yield
    SCHEDULES.remove("change")
    SCHEDULES.remove("look")


def test_a_schedule_that_decides_at_each_step(registered):
    """It plans nothing, sees the call's arguments, and keeps what it needs between steps."""
    made, memory, computed, kinds = make_schedule("change", limit=2.0), {}, [], []
    assert made.plan(10, 1) is None and not made.decides
    for step in range(6):
        inputs = {"x": torch.tensor(1.5 * step)}
        signals = Signals(step, 6, tuple(computed), inputs, memory=memory)
        kinds.append(made.kind(step, 6, signals))
        computed += [step] if kinds[-1] is UPDATE else []
    assert kinds == [UPDATE, DISPATCH, UPDATE, DISPATCH, UPDATE, UPDATE]
    recipe = Recipe.of("fora", schedule="change", limit=3.0)
    assert recipe.plan(28) is None and recipe.schedule.limit == 3.0
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.of("fora:limit=3.0").schedule == recipe.schedule  # only it has that setting


def test_a_schedule_that_decides_inside_a_step(registered):
    """It names the layers that always run, and looks at the streams in front of the others."""
    made = make_schedule("look", front=3)
    assert made.decides and (made.front, made.back) == (3, 1)
    memory = {}
    for value, expected in [(1.0, False), (1.01, False), (1.5, True)]:
        stream = torch.full((1, 4, 8), value)
        assert made.decide(3, Signals(1, 8, streams=(stream,), memory=memory)) is expected
    assert Recipe.of("fora", schedule=made).schedule is made
    with pytest.raises(ValueError, match=r"'look' decides inside a step.*level must be 'layers'"):
        Recipe.of("fora", schedule=made, level="output")


def moving(flux, recipe, moves):
    """Kinds of the steps and of their layers, while the input moves by so much at each step."""
    model, inputs = flux
    latents = inputs["hidden_states"]
    with torch.no_grad(), flashomni.accelerate(model, recipe) as engine:
        for step, move in enumerate(moves):
            latents = latents + move
            engine.step(step, len(moves))
            out = model(**{**inputs, "hidden_states": latents}, return_dict=False)[0]
            assert out.isfinite().all()
        return engine.report().steps


def test_the_engine_asks_at_each_step(registered, flux):
    """What the input does is what the steps are."""
    recipe = Recipe.of("fora", schedule="change", limit=2.0, of="hidden_states")
    steps = moving(flux, recipe, [0, 1.5, 1.5, 0, 1, 5, 0, 0])
    kinds = [step["kind"][0] for step in steps]
    assert "".join(kinds) == "ududdudu"
    assert all(set(s["layer_kinds"]) == {"bypass"} for s in steps if s["kind"] == "dispatch")


def test_the_engine_asks_inside_a_step(registered, flux):
    """The first and the last layer always run; the others where the streams have moved."""
    recipe = Recipe.of("fora", schedule="look", tolerance=1e-6)
    steps = moving(flux, recipe, [0, 0, 3, 0, 0, 0, 0, 0])
    assert "".join(step["kind"][0] for step in steps) == "udududdf"
    middle = [set(s["layer_kinds"][1:-1]) for s in steps if s["kind"] == "dispatch"]
    ends = [{s["layer_kinds"][0], s["layer_kinds"][-1]} for s in steps if s["kind"] == "dispatch"]
    assert all(kinds == {"bypass"} for kinds in middle)
    assert all("bypass" not in kinds for kinds in ends)


def test_a_schedule_must_say_something():
    """Neither plan nor kind nor decide: the error names the class."""

    class Silent(Schedule):
        pass

    assert Silent().plan(4, 1) is None and (Silent.front, Silent.back) == (0, 0)
    with pytest.raises(TypeError, match="Silent implements neither plan nor kind"):
        Silent().kind(0, 4, Signals(0, 4))
    with pytest.raises(TypeError, match="Silent does not implement decide"):
        Silent().decide(0, Signals(0, 4))
    with pytest.raises(TypeError, match="schedule Silent must be a frozen dataclass"):
        schedule("silent")(Silent)
