"""Putting an engine on a model: offloading, and every refusal, which leaves nothing behind."""

import pytest
import torch
from torch import nn

import flashomni
from conftest import (
    ADAPTERS,
    SPARSE,
    STEPS,
    call,
    generation,
    residue,
    run,
    self_attention,
    sparse_run,
)
from flashomni.models import adapters, find_adapter

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offloading_works_in_any_order(tiny, offload_first):
    """accelerate's offload hook wraps the model before or after us; remove() keeps it."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    model, inputs = tiny
    expected, _ = sparse_run(model)
    if offload_first:
        cpu_offload_with_hook(model, "cpu")
    engine = flashomni.accelerate(model, SPARSE)
    if not offload_first:
        cpu_offload_with_hook(model, "cpu")
    assert torch.equal(generation(engine, model, inputs), expected)
    engine.remove()
    assert hasattr(model, "_hf_hook")
    remove_hook_from_module(model)


def test_no_gradients(tiny):
    """With autograd on, an accelerated model refuses instead of losing gradients."""
    model, inputs = tiny
    with flashomni.accelerate(model, SPARSE) as engine:
        engine.step(0, STEPS)
        with torch.enable_grad(), pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
            call(model, inputs)


def test_bare_transformer_needs_the_step(tiny):
    """Without a scheduler nothing tells the step: the error says what to call."""
    model, inputs = tiny
    with (
        flashomni.accelerate(model, SPARSE),
        pytest.raises(ValueError, match=r"engine\.step\(i, num_steps\)"),
    ):
        call(model, inputs)


def test_refusals_leave_nothing_installed(tiny):
    """Bad recipe, bad backend, hooks, foreign processors: an error each, and a clean model."""
    model, _ = tiny
    site = find_adapter(model).sites(model)[0]
    clean = residue(model)
    with pytest.raises(ValueError, match="recipe must be a preset"):
        flashomni.accelerate(model, "ludicrous")
    for backend in ("abacus", "parts"):  # which only refreshes have
        with pytest.raises(ValueError, match=r"backend must be one of .*reference"):
            flashomni.accelerate(model, backend=backend)
    attention = self_attention(site.block)
    stock = attention.processor
    attention.processor = object()
    with pytest.raises(NotImplementedError, match="attention processor object is not supported"):
        flashomni.accelerate(model)
    attention.processor = stock
    assert residue(model) == clean
    engine = flashomni.accelerate(model)
    with pytest.raises(ValueError, match=r"accelerated already: call engine.remove\(\) first"):
        flashomni.accelerate(model)
    engine.remove()
    site.block.forward = lambda *args, **kwargs: None
    with pytest.raises(NotImplementedError, match=rf"{site.name} carries the hook"):
        flashomni.accelerate(model)
    del site.block.forward
    with pytest.raises(NotImplementedError, match="accelerate it first, then compile"):
        flashomni.accelerate(torch.compile(model))
    assert residue(model) == clean


@pytest.mark.parametrize("name", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig"])
def test_a_diffusers_cache_is_refused_until_it_is_disabled(tiny, name):
    """On blocks or inside their attention: two caches would each hide the other's work."""
    import diffusers

    model, inputs = tiny
    expected, _ = sparse_run(model)
    settings = {
        "FirstBlockCacheConfig": {"threshold": 0.1},
        "PyramidAttentionBroadcastConfig": {
            "spatial_attention_block_skip_range": 2,
            "current_timestep_callback": lambda: 500,
        },
    }[name]
    try:
        model.enable_cache(getattr(diffusers, name)(**settings))
    except (AttributeError, ValueError) as refusal:
        pytest.skip(f"diffusers does not offer it for this model: {refusal}")
    with pytest.raises(NotImplementedError, match=r"carries the hook (fbc|pyramid)"):
        flashomni.accelerate(model)
    model.disable_cache()
    again, _ = run(model, inputs, SPARSE)
    assert torch.equal(again, expected)


def test_cache_dit_is_refused_by_name(tiny):
    """It marks what it patches."""
    model, _ = tiny
    model._is_cached = True
    with pytest.raises(NotImplementedError, match="cache-dit is enabled"):
        flashomni.accelerate(model)


def test_unsupported_models_name_what_is_supported():
    """The error lists the transformer classes."""
    with pytest.raises(ValueError, match=f"transformer must be one of {', '.join(ADAPTERS)}"):
        flashomni.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pipe must be a diffusers pipeline with a transformer"):
        flashomni.accelerate("a string")


def test_flux_attention_kwargs_are_refused():
    """joint_attention_kwargs would be lost: refused by name, and the engine stays usable."""
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    with flashomni.accelerate(model, SPARSE) as engine:
        engine.step(0, STEPS)
        with pytest.raises(NotImplementedError, match="ip_hidden_states"):
            model(**inputs, joint_attention_kwargs={"ip_hidden_states": []})
        generation(engine, model, inputs, steps=3)
