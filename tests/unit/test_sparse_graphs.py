"""Sparse steps, refreshes and weights of a scheduler as graphs: the bits are the same."""

import pytest
import torch
from loops import Loop
from test_graphs import accelerate, plain_run, replays

import flashomni
from conftest import STEPS, call, first_item, generation, residue
from flashomni.engine.schedules import StepKind
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

EVERY = "topk:q_density=1,kv_density=.5,interval=1,warmup=0,in_computed=true,block_m=32,block_n=32"
TILES = "topk:q_density=.5,kv_density=.5,interval=3,warmup=.2,order=1,in_computed=true"
CARRY = ",choose_at=[1],dense_steps=2,carry=extrapolate,refresh=3,summaries=4"


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval(), first_item(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [EVERY + CARRY, TILES + CARRY], ids=["every step", "tiles"])
def test_sparse_steps_are_replayed(flux, recipe):
    """Chosen, refreshed, sparse and dispatched; a refresh is a kind of step of its own."""
    model, inputs = flux
    expected, summary = plain_run(model, inputs, recipe)
    with accelerate(model, recipe) as engine:
        for _ in range(2):
            assert torch.equal(generation(engine, model, inputs), expected)
        before = replays(engine)
        assert torch.equal(generation(engine, model, inputs), expected)
        assert replays(engine) - before == STEPS
        last = engine.report()
        for a, b in zip(last.steps, summary.steps, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
        assert last.attention_spent == summary.attention_spent
    assert residue(model) == []


def test_the_key_tells_what_a_full_step_does(flux):
    """Dense, a choice with its refresh, sparse, a refresh: the same kind of step, four keys."""
    model, inputs = flux
    recipe = EVERY + CARRY.replace("refresh=3", "refresh=2")
    with accelerate(model, recipe) as engine:
        for step in range(4):
            engine.step(step, STEPS)
            call(model, inputs)
        (slot,) = engine._runtime.graphs._slots
        first, *others = [key for _, key in slot.entries]
    assert first is StepKind.FULL
    did = [key[2][0] for key in others]
    assert [kind for kind, *_ in did] == [StepKind.FULL] * 3
    assert [(x.chooses, x.refreshes, x.skips) for *_, x in did] == [
        (True, True, False), (False, False, True), (False, True, False),
    ]  # fmt: skip


@pytest.mark.slow
def test_weights_are_those_of_the_noise_at_hand(flux):
    """Between two generations a scheduler may get another shift: as many steps, other weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, inputs = flux
    loop = Loop(model, None, inputs)
    recipe = "taylorseer:interval=3,warmup=.2,level=layers,layer_order=1,forecast=quadrature"
    graphed, expected, shifts = [], [], (1.0, 1.0, 6.0, 1.0)
    for outputs, made in ((graphed, accelerate), (expected, flashomni.accelerate)):
        loop.scheduler = FlowMatchEulerDiscreteScheduler()
        with made(loop, recipe) as engine:
            for shift in shifts:
                loop.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
                outputs.append(loop(9))
            assert replays(engine) == (27 if made is accelerate else 0)
    assert not torch.equal(expected[1], expected[2])
    for one, other in zip(graphed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(graphed[1], graphed[3])
