"""Whole diffusers pipelines with random weights: everything a user does between two calls."""

import pytest
import torch

import flashomni
from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.policies import make_policy

SPARSE = Recipe.of(
    make_policy("topk", q_density=0.5, kv_density=0.6), interval=3, warmup=0.2, order=1
)
SMALL = {
    "tiny-image": {"height": 88, "width": 72, "num_inference_steps": 8},
    "tiny-video": {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 8},
}


@pytest.fixture(params=zoo.RANDOM, scope="module")
def loaded(request):
    """A small random pipeline and a call of a fraction of a second."""
    loaded = zoo.random_pipeline(request.param, heads=2, head_dim=32, dual=1, single=2)
    loaded.pipe.set_progress_bar_config(disable=True)
    loaded.call.update(SMALL[request.param])
    return loaded


@pytest.fixture(autouse=True)
def clean(loaded):
    """Each test gets and leaves a stock pipeline."""
    yield
    assert not any("forward" in m.__dict__ for m in loaded.pipe.transformer.modules())


def generate(loaded, prompt="a red circle left of a blue square", seed=0, **changes):
    call = {**loaded.call, **changes}
    generator = torch.Generator().manual_seed(seed)
    return loaded.pipe(prompt, **call, generator=generator, output_type="pt")[0]


def test_lossless_is_the_stock_pipeline(loaded):
    """Max abs difference at most 1e-4 in fp32, and the bits of before after remove()."""
    stock = generate(loaded)
    with flashomni.accelerate(loaded.pipe, "lossless"):
        assert (generate(loaded) - stock).abs().max() <= 1e-4
    assert torch.equal(generate(loaded), stock)


def test_a_sparse_recipe_changes_little_and_reports_it(loaded):
    """Accelerated output is near the dense one but not equal; the report counts every call."""
    stock = generate(loaded)
    with flashomni.accelerate(loaded.pipe, SPARSE) as engine:
        sparse = generate(loaded)
        summary = engine.report()
    assert 0 < (sparse - stock).abs().mean() < 0.1
    assert [step["step"] for step in summary.steps] == list(range(8))
    assert summary.steps[-1]["kind"] == "full"
    assert 0.05 < summary.flops_skipped < 0.9 and summary.cache_bytes > 0
    assert all(step["seconds"] > 0 for step in summary.steps)


@pytest.mark.slow
def test_calls_do_not_leak_into_each_other(loaded):
    """Other steps, size, batch, guidance and prompts in between: every call equals it alone."""
    calls = [
        {},
        {"num_inference_steps": 5},
        {"height": 64, "width": 48},
        {"prompt": ["a ring", "a large green star on a floor"]},
        {"guidance_scale": 1.5},
        {"num_inference_steps": 1},
        {"num_inference_steps": 2},
    ]
    alone = []
    for call in calls:
        with flashomni.accelerate(loaded.pipe, SPARSE):
            alone.append(generate(loaded, **call))
    with flashomni.accelerate(loaded.pipe, SPARSE):
        for call, expected in zip([*calls, *calls], [*alone, *alone], strict=True):
            assert torch.equal(generate(loaded, **call), expected)


def test_images_per_prompt(loaded):
    """Two pictures of one prompt; the first of a batch of prompts is what it is alone."""
    name = "num_images_per_prompt" if "num_frames" not in loaded.call else "num_videos_per_prompt"
    with flashomni.accelerate(loaded.pipe, SPARSE):
        two = generate(loaded, **{name: 2})
        again = generate(loaded, **{name: 2})
    assert len(two) == 2 and not torch.equal(two[0], two[1])
    assert torch.equal(two, again)


@pytest.mark.slow
def test_true_guidance_keeps_its_branches_apart(loaded):
    """With real CFG, cond and uncond have caches of their own: equal prompts, equal branches."""
    with flashomni.accelerate(loaded.pipe, SPARSE) as engine:
        plain = generate(loaded, prompt="a star")
        guided = generate(loaded, prompt="a star", negative_prompt="a star", true_cfg_scale=3.0)
        branches = {step["branch"] for step in engine.report().steps}
        mixed = generate(loaded, prompt="a star", negative_prompt="a ring", true_cfg_scale=3.0)
    assert branches == {"cond", "uncond"}
    # guidance between a branch and its equal changes nothing beyond rounding
    torch.testing.assert_close(plain, guided, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(mixed, plain, atol=1e-3)


def test_a_pipeline_that_raises_can_be_used_again(loaded):
    """An exception in the middle of a generation; the next one is not touched by it."""
    with flashomni.accelerate(loaded.pipe, SPARSE):
        alone = generate(loaded)

        def stop(pipe, step, timestep, kwargs):
            if step == 4:
                raise KeyboardInterrupt
            return kwargs

        with pytest.raises(KeyboardInterrupt):
            generate(loaded, seed=1, callback_on_step_end=stop)
        assert torch.equal(generate(loaded), alone)


def test_without_cache_contexts_branches_are_told_apart_by_order(loaded, monkeypatch):
    """Pipelines that name no branch (img2img, Kontext, I2V) get the same result."""
    guided = {"negative_prompt": "a ring", "true_cfg_scale": 2.0}
    with flashomni.accelerate(loaded.pipe, SPARSE):
        named = generate(loaded, **guided)
    from contextlib import nullcontext

    monkeypatch.setattr(
        loaded.pipe.transformer, "cache_context", lambda *_, **__: nullcontext(), raising=False
    )
    with flashomni.accelerate(loaded.pipe, SPARSE) as engine:
        assert torch.equal(generate(loaded, **guided), named)
        assert {step["branch"] for step in engine.report().steps} == {"call", "call#1"}


def test_caches_are_freed_when_a_generation_ends(loaded):
    """After the last step the engine holds no tensor."""
    with flashomni.accelerate(loaded.pipe, SPARSE) as engine:
        generate(loaded)
        assert sum(engine._runtime.last.nbytes()) == 0


def test_pipelines_survive_a_round_trip_to_disk(loaded, tmp_path):
    """A saved folder loads by path, with its flashomni.json, and generates the same bits."""
    stock = generate(loaded)
    loaded.pipe.save_pretrained(tmp_path)
    (tmp_path / "flashomni.json").write_text('{"prompt": "a ring", "call": {"height": 64}}')
    again = zoo.load(tmp_path)
    again.pipe.set_progress_bar_config(disable=True)
    assert (again.prompt, again.call) == ("a ring", {"height": 64})
    again.call.update(loaded.call)
    assert torch.equal(generate(again), stock)


@pytest.mark.slow
def test_what_is_saved_while_it_is_accelerated_is_the_stock_pipeline(loaded, tmp_path):
    """Hooks and caches stay behind, and the pipeline that was saved goes on."""
    stock = generate(loaded)
    with flashomni.accelerate(loaded.pipe, SPARSE):
        fast = generate(loaded)
        loaded.pipe.save_pretrained(tmp_path)
        assert torch.equal(generate(loaded), fast)
    again = zoo.load(tmp_path)
    again.pipe.set_progress_bar_config(disable=True)
    again.call.update(loaded.call)
    assert flashomni.engine_of(again.pipe) is None and torch.equal(generate(again), stock)


@pytest.mark.parametrize("loaded", ["tiny-image"], indirect=True)
def test_modular_pipelines(loaded):
    """Steps are known without a callback, the handle is found, and afterwards it is stock."""
    from diffusers.modular_pipelines import FluxAutoBlocks

    pipe = FluxAutoBlocks().init_pipeline()
    pipe.update_components(**{k: v for k, v in loaded.pipe.components.items() if v is not None})
    pipe.set_progress_bar_config(disable=True)

    def make():
        generator = torch.Generator().manual_seed(0)
        call = {**loaded.call, "output": "images", "output_type": "pt"}
        return pipe(prompt="a cat", generator=generator, **call)

    stock = make()
    with flashomni.accelerate(pipe, "fora:level=layers,interval=2,warmup=0") as engine:
        made, report = make(), engine.report()
        assert flashomni.engine_of(pipe) is engine
    assert [step["step"] for step in report.steps] == list(range(8))
    assert report.flops_skipped > 0.3 and not torch.equal(made, stock)
    with flashomni.accelerate(pipe, "lossless"):
        torch.testing.assert_close(make(), stock, atol=1e-4, rtol=1e-3)
    assert torch.equal(make(), stock) and flashomni.engine_of(pipe) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be"),
        ('{"call": 3}', "must be"),
        ('{"prompt": 3}', "must be"),
    ],
)
def test_a_corrupt_note_is_refused(tmp_path, text, message):
    """flashomni.json is checked before anything is generated."""
    (tmp_path / "flashomni.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        zoo.read_note(tmp_path)


@pytest.mark.parametrize("model", ["no-such-model", "a/b/c"])
def test_unknown_models_are_refused(model):
    """The error lists what a model can be."""
    with pytest.raises(
        ValueError, match="model must be tiny-image, tiny-video, tiny-wan, a diffusers folder"
    ):
        zoo.load(model)
