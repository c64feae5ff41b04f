"""What the engine promises whatever happens between calls, on a model of each kind."""

import pytest
import torch

import flashomni
from conftest import SPARSE, STEPS, call, first_item, generation, run, sparse_run
from flashomni.engine import Recipe
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")


def test_number_of_steps_and_batch_may_change(tiny):
    """Another number of steps or another batch starts afresh and equals a run of its own."""
    model, inputs = tiny
    single = first_item(inputs)
    short, _ = run(model, inputs, SPARSE, steps=6)
    small, _ = run(model, single, SPARSE)
    with flashomni.accelerate(model, SPARSE) as engine:
        generation(engine, model, inputs)
        assert torch.equal(generation(engine, model, inputs, steps=6), short)
        assert torch.equal(generation(engine, model, single), small)


def test_a_generation_that_breaks_off_leaves_nothing(tiny):
    """Seven steps, then from the start: the caches of the seven are gone before the first step."""
    model, inputs = tiny
    alone, _ = sparse_run(model)
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(7):
            engine.step(step, STEPS)
            call(model, inputs)
        kept = sum(engine._runtime.last.nbytes())
        engine.step(0, STEPS)
        assert torch.equal(call(model, inputs), alone[0])
        left = sum(engine._runtime.last.nbytes())
        assert 0 < left < 0.5 * kept  # what a warm-up step records, and no more
        assert torch.equal(generation(engine, model, inputs), alone)


def test_another_shape_within_a_generation_starts_afresh(tiny):
    """The batch changes on a Dispatch step: that step becomes an Update, nothing is mixed up."""
    model, inputs = tiny
    single = first_item(inputs)
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(4):
            engine.step(step, STEPS)
            call(model, inputs if step < 3 else single)
        assert engine.report().steps[3]["kind"] == "update"
        engine.step(4, STEPS)
        assert call(model, single).isfinite().all()


def test_a_branch_may_join_late(tiny):
    """A branch whose first call falls on a Dispatch step starts with an Update."""
    model, inputs = tiny
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS, "cond")
            call(model, inputs)
            if step >= 4:
                engine.step(step, STEPS, "uncond")
                assert call(model, inputs).isfinite().all()
        kinds = [s["kind"] for s in engine.report().steps if s["branch"] == "uncond"]
    assert kinds[0] == "update" and "dispatch" in kinds


def test_a_call_that_raises_leaves_the_engine_usable(tiny):
    """An error in the middle of a step, then a generation: the bits of a fresh one."""
    model, inputs = tiny
    alone, _ = sparse_run(model)
    with flashomni.accelerate(model, SPARSE) as engine:
        engine.step(0, STEPS)
        call(model, inputs)
        engine.step(1, STEPS)
        broken = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][..., :-1]}
        with pytest.raises(RuntimeError):
            call(model, broken)
        assert not engine.running
        assert torch.equal(generation(engine, model, inputs), alone)


def test_degradation_takes_effect_and_is_reversible(tiny):
    """S_q: a layer is cached whole while few tiles are computed, and comes back when more are."""
    model, inputs = tiny

    class Wave(type(make_policy("topk"))):
        """Computes little at first and everything later."""

        name = "wave"

        def __call__(self, site):
            density = 0.3 if float(site.progress) < 0.6 else 1.0
            return make_policy("topk", q_density=density, kv_density=1.0)(site)

        def known_fraction(self, grid):
            return None

    recipe = Recipe.of(Wave(), interval=2, warmup=0.0, order=1, degrade_below=0.7)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(16):
            engine.step(step, 16)
            call(model, inputs)
            for layer in engine._runtime.last.branches["call"].layers:  # never both kinds of memory
                assert not layer.degraded or (layer.bias_terms is None and not layer.history)
        kinds = [s["layer_kinds"][0] for s in engine.report().steps]
    assert "bypass" in kinds and kinds[1] == "dispatch"  # measured at one Update, used at the next
    assert "dispatch" in kinds[kinds.index("bypass") :]


def test_histories_in_bfloat16_take_half_the_memory(tiny):
    """history_dtype halves what is kept and stays close."""
    model, inputs = tiny
    full, wide = sparse_run(model)
    half, narrow = run(model, inputs, SPARSE.replace(history_dtype="bfloat16"))
    assert narrow.cache_bytes < 0.55 * wide.cache_bytes
    torch.testing.assert_close(full, half, atol=2e-2, rtol=2e-2)


def test_the_first_interval_can_cache_whole_layers(tiny):
    """S_q is decided by a probe in the warm-up, so the first Dispatch already bypasses layers."""
    model, inputs = tiny
    light = Recipe.of(
        make_policy("flashomni", tau_q=1.0, tau_kv=0.0, power=0.0),
        interval=3,
        warmup=0.5,
        order=1,
        layer_order=1,
        degrade_below=0.9,
        block_m=16,
        block_n=16,
    )
    _, report = run(model, inputs, light)
    kinds = [step["kind"] for step in report.steps]
    first = kinds.index("dispatch")
    assert set(report.steps[first]["layer_kinds"]) == {"bypass"}
    _, strict = run(model, inputs, light.replace(degrade_below=0.0))
    assert set(strict.steps[first]["layer_kinds"]) == {"dispatch"}


def test_nothing_is_chosen_in_layers_that_are_cached_whole(flux, monkeypatch):
    """Where that is known before: the tiles would be dropped."""
    model, inputs = flux
    recipe = "taylorseer:interval=3,warmup=0,level=layers"
    expected, _ = run(model, inputs, recipe, 5)
    monkeypatch.setattr(type(Recipe.of(recipe).policy), "__call__", None)
    found, summary = run(model, inputs, recipe, 5)
    assert torch.equal(found, expected) and summary.flops_skipped > 0
