"""What is done to an accelerated model afterwards, and to copies of it: honoured, or refused."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch

import flashomni
from conftest import (
    SPARSE,
    STEPS,
    call,
    generation,
    own_arguments,
    residue,
    run,
    self_attention,
    sparse_run,
)
from flashomni.models import find_adapter

pytestmark = pytest.mark.usefixtures("no_grad")


def blocks(model):
    return [site.block for site in find_adapter(model).sites(model)]


def step(engine, model, inputs, index=0):
    engine.step(index, STEPS)
    return call(model, inputs)


def foreign_processor(model):
    attention = self_attention(blocks(model)[-1])
    stock = type(attention.processor)
    attention.processor = type("Other", (stock,), {})()
    return "attention processor Other"


def attention_backend(model):
    self_attention(blocks(model)[0]).processor._attention_backend = "sage"
    return "attention backend 'sage'"


def context_parallelism(model):
    self_attention(blocks(model)[0]).processor._parallel_config = object()
    return "context parallelism"


def first_block_cache(model):
    from diffusers import FirstBlockCacheConfig

    enable(model, FirstBlockCacheConfig(threshold=0.5))
    return "fbc"


def enable(model, config):
    try:
        model.enable_cache(config)
    except (AttributeError, ValueError) as refusal:
        pytest.skip(f"diffusers does not offer it for this model: {refusal}")


def taylorseer_cache(model):
    from diffusers import TaylorSeerCacheConfig

    enable(model, TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2))
    return "taylorseer_cache|TaylorSeerCacheConfig"


def pyramid_cache(model):
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    enable(model, config)
    return "pyramid"


def replaced_forward(model):
    blocks(model)[1].forward = lambda *args, **kwargs: None
    return "replaced forward"


def cache_dit(model):
    model._is_cached = True
    return "cache-dit"


CHANGES = (
    foreign_processor, attention_backend, context_parallelism, first_block_cache, taylorseer_cache,
    pyramid_cache, replaced_forward, cache_dit,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_would_be_ignored_is_refused_in_either_order(tiny, change, when):
    """By name: at accelerate, or at the first call of the next generation."""
    model, inputs = tiny
    if when == "before":
        word = change(model)
        if change is attention_backend:  # then it is kept, see test_chosen_attention
            with flashomni.accelerate(model, "lossless") as engine:
                assert engine.report().tier != "adapter"
            return
        with pytest.raises(NotImplementedError, match=word):
            flashomni.accelerate(model, "lossless")
        return
    with flashomni.accelerate(model, "lossless") as engine:
        generation(engine, model, inputs, steps=2)
        word = change(model)
        with pytest.raises(NotImplementedError, match=word):
            step(engine, model, inputs)
        assert not engine.running


def test_a_cache_that_is_disabled_again_leaves_the_engine_working(tiny):
    """enable, refusal, disable: the next generation is what it was."""
    model, inputs = tiny
    expected, _ = sparse_run(model)
    with flashomni.accelerate(model, SPARSE) as engine:
        first_block_cache(model)
        with pytest.raises(NotImplementedError):
            step(engine, model, inputs)
        model.disable_cache()
        assert torch.equal(generation(engine, model, inputs), expected)


def test_a_model_forward_that_leaves_calls_out(tiny):
    """Patched onto the instance, it answers some steps itself: honoured, and nothing goes stale."""
    model, inputs = tiny
    inner, kept = model.forward, []

    def forward(*args, **kwargs):
        if len(kept) in (1, 4):
            kept.append(kept[-1])
            return kept[-1]
        kept.append(inner(*args, **kwargs))
        return kept[-1]

    model.forward = forward
    with flashomni.accelerate(model, "lossless") as engine:
        got = [step(engine, model, inputs, index) for index in range(6)]
    assert torch.equal(got[0], got[1]) and torch.equal(got[3], got[4])
    with flashomni.accelerate(model, "fora:interval=3,warmup=0.2") as engine:
        kept.clear()
        assert all(step(engine, model, inputs, index).isfinite().all() for index in range(8))


def test_another_transformer_is_noticed(tiny):
    """The engine is no longer attached to what the pipeline uses, and the report says so."""
    model, inputs = tiny
    scheduler = SimpleNamespace(timesteps=torch.arange(4), step_index=None)
    pipe = SimpleNamespace(transformer=model, scheduler=scheduler)
    engine = flashomni.accelerate(pipe, SPARSE)
    assert engine.attached and flashomni.engine_of(pipe) is engine
    step(engine, model, inputs)
    pipe.transformer = copy.deepcopy(model)
    assert not engine.attached and flashomni.engine_of(pipe) is None
    assert "another transformer" in engine.report().notes[0]
    again = flashomni.accelerate(pipe, SPARSE)
    again.remove()
    engine.remove()


@pytest.mark.slow
def test_a_deep_copy_is_the_stock_model(tiny):
    """It runs its own weights, without the engine, and can be accelerated itself."""
    model, inputs = tiny
    with flashomni.accelerate(model, "fora") as engine:
        generation(engine, model, inputs)
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        steps = len(engine.report().steps)
        got = call(other, inputs)
        assert len(engine.report().steps) == steps
    stock = copy.deepcopy(model)
    for parameter in stock.parameters():
        parameter.mul_(0.5)
    assert torch.equal(got, call(stock, inputs))
    with flashomni.accelerate(other, SPARSE) as engine:
        first = generation(engine, other, inputs)
    expected, _ = run(stock, inputs, SPARSE)
    assert torch.equal(first, expected)


def test_a_copy_of_a_copy_and_a_copy_of_a_block(tiny):
    """Whatever is copied is stock."""
    model, inputs = tiny
    stock = call(model, inputs)
    with flashomni.accelerate(model, "lossless"):
        twice = copy.deepcopy(copy.deepcopy(model))
        block = copy.deepcopy(blocks(model)[0])
    assert torch.equal(call(twice, inputs), stock)
    assert block.forward.__self__ is block


def test_a_pickle_of_an_accelerated_model_is_the_stock_model(tiny):
    """torch.save of the module, multiprocessing: no engine travels."""
    model, inputs = tiny
    stock = call(model, inputs)
    with flashomni.accelerate(model, SPARSE) as engine:
        step(engine, model, inputs)
        other = pickle.loads(pickle.dumps(model))
    assert torch.equal(call(other, inputs), stock)
    with flashomni.accelerate(other, SPARSE) as engine:
        assert step(engine, other, inputs).isfinite().all()


def test_a_hook_on_top_of_ours_may_outlive_us(tiny):
    """Put on after us and taken off after we went: the model can be accelerated again."""
    from diffusers.hooks import HookRegistry, ModelHook

    model, inputs = tiny
    stock, clean = call(model, inputs), residue(model)
    engine = flashomni.accelerate(model, SPARSE)
    registry = HookRegistry.check_if_exists_or_initialize(blocks(model)[0])
    registry.register_hook(ModelHook(), "other")
    engine.remove()
    assert torch.equal(call(model, inputs), stock)
    registry.remove_hook("other")
    assert torch.equal(call(model, inputs), stock)
    expected, _ = run(model, inputs, SPARSE)
    assert torch.equal(call(model, inputs), stock)
    del blocks(model)[0]._diffusers_hook
    assert residue(model) == clean
    again, _ = run(model, inputs, SPARSE)
    assert torch.equal(again, expected)


def test_offloading_put_on_again_in_between(tiny):
    """Pipelines take accelerate's hook off and put it on after each run; ours must survive that."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    model, inputs = tiny
    recipe = "fora:level=output"
    expected, _ = run(model, inputs, recipe)
    cpu_offload_with_hook(model, "cpu")
    with flashomni.accelerate(model, recipe) as engine:
        assert torch.equal(generation(engine, model, inputs), expected)
        remove_hook_from_module(model, recurse=True)
        cpu_offload_with_hook(model, "cpu")
        assert torch.equal(generation(engine, model, inputs), expected)
        assert "dispatch" in {s["kind"] for s in engine.report().steps}
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(call(model, inputs), call(model, inputs))


def test_restore_needs_no_handle(tiny):
    """engine_of finds it, restore removes it and says whether there was one."""
    model, inputs = tiny
    before, clean = call(model, inputs), residue(model)
    assert flashomni.engine_of(model) is None and not flashomni.restore(model)
    engine = flashomni.accelerate(model, SPARSE)
    assert flashomni.engine_of(model) is engine
    assert flashomni.restore(model) and not flashomni.restore(model)
    assert residue(model) == clean and torch.equal(call(model, inputs), before)
    assert not engine.attached and flashomni.engine_of("a string") is None


def test_keywords_change_the_recipe(tiny):
    """accelerate(pipe, preset, setting=value); an unknown one is named."""
    model, _ = tiny
    with flashomni.accelerate(model, "balanced", interval=3, order=0) as engine:
        assert engine.recipe.schedule.interval == 3 and engine.recipe.forecast.order == 0
    with pytest.raises(ValueError, match="got 'intervall'"):
        flashomni.accelerate(model, "balanced", intervall=3)
    assert flashomni.engine_of(model) is None


def test_the_library_says_what_it_does(tiny, caplog):
    """One line at accelerate and one a generation, at INFO, on the logger ``flashomni``."""
    model, inputs = tiny
    with caplog.at_level(logging.INFO, logger="flashomni"):
        run(model, inputs, "fora")
    lines = [record.getMessage() for record in caplog.records if record.name == "flashomni"]
    assert len(lines) == 2
    assert "accelerated with recipe fora" in lines[0] and "cached whole" in lines[1]


def test_a_generation_that_gains_nothing_is_a_warning_once(tiny, caplog):
    """Too few steps, or projections that run dense; the next one like it says nothing more."""
    model, inputs = tiny

    def warned(recipe, steps):
        caplog.clear()
        for _ in range(2):
            run(model, inputs, recipe, steps=steps)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    with flashomni.accelerate(model, "balanced") as engine:
        caplog.clear()
        for _ in range(2):
            for index in range(5):
                engine.step(index, 5)
                call(model, inputs)
        (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said.endswith("0 Dispatch steps: nothing to gain at 5 steps (this recipe skips from 10 "
                         "steps on)")  # fmt: skip
    assert warned("lossless", 5) == [] and warned("fora", STEPS) == []


def test_a_recipe_that_skips_next_to_nothing_is_noted(tiny):
    """Its Dispatch steps are there, and are worth nothing."""
    model, inputs = tiny
    wide = flashomni.Recipe.of("topk:q_density=1,kv_density=1,interval=3,warmup=0")
    assert any("next to nothing is skipped" in note for note in run(model, inputs, wide)[1].notes)
    assert not [n for n in run(model, inputs, "fora")[1].notes if "next to nothing" in n]


@pytest.mark.covering(2)
@pytest.mark.parametrize("steps", [4, 5, 9])
@pytest.mark.parametrize("preset", ["quality", "balanced", "fast", "lossless"])
def test_short_runs_are_served_and_the_report_says_what_could_be_gained(tiny, preset, steps):
    """Few-step models: everything is computed, equal to stock, and a note says so."""
    model, inputs = tiny
    outputs, summary = run(model, inputs, preset, steps=steps)
    exact, _ = run(model, inputs, "lossless", steps=steps)
    torch.testing.assert_close(outputs, exact, atol=2e-5, rtol=1e-4)
    if preset != "lossless":
        assert f"0 Dispatch steps: nothing to gain at {steps} steps" in summary.notes[0]


def test_the_output_level_skips_the_whole_model(tiny):
    """Forecast of what the model returned: exact for constant inputs, far less memory."""
    model, inputs = tiny
    stock = call(model, inputs)
    with flashomni.accelerate(model, "taylorseer:interval=3,warmup=0.2,level=output") as engine:
        for index in range(STEPS):
            torch.testing.assert_close(
                step(engine, model, inputs, index), stock, atol=2e-5, rtol=1e-4
            )
        output = engine.report()
    _, layers = run(model, inputs, "taylorseer:interval=3,warmup=0.2,level=layers")
    assert output.cache_bytes < 0.7 * layers.cache_bytes
    assert output.flops_skipped == pytest.approx(layers.flops_skipped)
    assert torch.equal(call(model, inputs), stock)


def test_the_output_level_keeps_the_structure(tiny):
    """return_dict=True gives the model's own output class on Dispatch steps too."""
    model, inputs = tiny
    given = own_arguments(model, inputs)
    kind = type(model(**given))
    with flashomni.accelerate(model, "fora:interval=3,warmup=0.2,level=output") as engine:
        for index in range(STEPS):
            engine.step(index, STEPS)
            out = model(**given)
            assert type(out) is kind and all(item.isfinite().all() for item in out.sample)
        assert "dispatch" in {s["kind"] for s in engine.report().steps}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["balanced", "balanced:level=layers"])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"])
def test_compiling_after_accelerate(name, recipe):
    """The order our refusal recommends: the values of the engine, at most six compilations.

    Where the output is cached the engine decides in front of the model, and runs it as it is.
    """
    from torch._dynamo.utils import counters

    from flashomni.models import adapters

    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    expected, _ = run(model.eval(), dict(inputs), recipe, steps=28)
    torch._dynamo.reset()
    counters.clear()
    with flashomni.accelerate(model, recipe) as engine:
        compiled = torch.compile(model, backend="aot_eager")
        got = generation(engine, compiled, dict(inputs), steps=28)
        kinds = {step["kind"] for step in engine.report().steps}
    assert torch.equal(got, expected) and kinds == {"full", "update", "dispatch"}
    assert counters["stats"]["unique_graphs"] <= 6
    assert bool(counters["stats"]["unique_graphs"]) is recipe.endswith("layers")
