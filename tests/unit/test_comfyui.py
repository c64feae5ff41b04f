"""The ComfyUI node over a small fake of what ComfyUI gives a node (tests/fake_comfyui.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashomni import Recipe
from flashomni.policies import make_policy

FOLDER = Path(__file__).parents[2] / "integrations/comfyui"
SIGMAS = torch.linspace(1, 0, 11)
FORA = "fora:level=layers"


def _load(name, path, **options):
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fake = _load("fake_comfyui", FOLDER.parents[1] / "tests/fake_comfyui.py")
# As ComfyUI loads a folder of custom_nodes: under a name that is no identifier.
PACKAGE = "custom_nodes/flashomni-comfyui"
nodes = _load(PACKAGE, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
sampling, picture = (sys.modules[f"{PACKAGE}.{name}"] for name in ("sampling", "picture"))
ACCELERATE, REPORT, TUNE = nodes.NODE_CLASS_MAPPINGS.values()


def patcher(cls=fake.Flux, **options):
    torch.manual_seed(0)
    return fake.Patcher(cls(**options).eval())


def sample(model, sampler=fake.euler, shape=(1, 4, 12, 14), control=None, sigmas=SIGMAS, **options):
    guider = fake.Guider(model, **options)
    guider.control = control
    x = fake.noise(shape).generate_noise(None)
    return guider.sample(x, torch.zeros(shape), sampler, sigmas)


def on(model, recipe=FORA, backend=None):
    ours = sampling.Accelerated(Recipe.of(recipe), backend)
    return ours.put_on(model), ours


def kinds(ours, branch=None):
    steps = ours.report.steps
    return "".join(s["kind"][0] for s in steps if branch in (None, s["branch"]))


@pytest.mark.parametrize("cls", [fake.Flux, fake.WanModel])
def test_nothing_is_left_out_and_nothing_changes(cls):
    model = patcher(cls)
    stock = sample(model)
    ones = Recipe(policy=make_policy("topk", q_density=1.0, kv_density=1.0))
    for recipe in ("lossless", ones):
        got = sample(on(model, recipe, "reference")[0])
        torch.testing.assert_close(got, stock, rtol=0, atol=1e-5)


def by_hand(model, plan):
    """Whole-layer caching written in ComfyUI's own hooks: what a block last added, added again."""
    clone, place = model.clone(), SimpleNamespace(step=-1)

    def count(executor, *args):
        place.step += 1
        return executor(*args)

    clone.add_wrapper_with_key("diffusion_model", "by hand", count)
    for key in sampling.blocks_of(model.model.diffusion_model):
        added = {}

        def patch(args, extra, added=added):
            names = [name for name in ("img", "txt") if name in args]
            if plan[place.step] == "d":
                return {name: args[name] + added[name] for name in names if name in added}
            given = {name: args[name].clone() for name in names}
            out = extra["original_block"]({**args, **given})
            added.update({name: out[name] - args[name] for name in out})
            return out

        clone.set_model_patch_replace(patch, "dit", *key)
    return clone


@pytest.mark.parametrize("cls", [fake.Flux, fake.WanModel])
@pytest.mark.parametrize("control", [None, 0.3])
def test_whole_layers_are_cached_as_by_hand(cls, control):
    """Blocks write to what they are given, and a ControlNet to what they return."""
    model = patcher(cls)
    model, control = patcher(cls), None if control is None else torch.tensor(control)
    clone, ours = on(model)
    got = [sample(clone, control=control) for _ in range(2)]
    # The node's first sampling learns what the blocks return; the second one knows.
    expected = sample(by_hand(model, kinds(ours)), control=control)
    assert kinds(ours).count("d") >= 5 and ours.report.flops_skipped > 0.4
    for each in got:
        torch.testing.assert_close(each, expected, rtol=0, atol=2e-5)
    assert (got[0] - sample(model, control=control)).abs().max() > 1e-3


def test_attention_is_skipped():
    recipe = Recipe(policy=make_policy("topk", q_density=0.5, kv_density=0.5))
    recipe = recipe.replace(block_m=16, block_n=16, degrade_below=0.0)
    model = patcher()
    clone, ours = on(model, recipe, "reference")
    sample(clone)
    report = ours.report
    assert report.flops_executed["attention"] < 0.9 * report.flops_dense["attention"]
    step = next(s for s in report.steps if s["kind"] == "dispatch")
    assert all(0 < q < 1 for q in step["q_density"])


@pytest.mark.parametrize(
    ("cls", "at", "expected"),
    [
        (fake.Flux, "first", (0, 5)),
        (fake.Flux, "last", (168, 173)),
        (fake.Flux, None, (0, 0)),
        (fake.WanModel, "first", (0, 0)),  # its attention is over the picture alone
    ],
)
def test_the_engine_is_told_where_the_text_is(monkeypatch, cls, at, expected):
    """In double blocks beside the picture, in single blocks in one stream with it."""
    found, tell = [], sampling.Sampling._text

    def told(self, *args):
        found.append(tell(self, *args))
        return found[-1]

    monkeypatch.setattr(sampling.Sampling, "_text", told)
    monkeypatch.setitem(sampling.TEXT, cls.__name__, at)
    sample(on(patcher(cls), "lossless", "reference")[0], sigmas=SIGMAS[-3:])
    assert len(found) >= 2 * 3 and set(found) == {expected}


def test_clones_share_it_and_the_patcher_stays_stock():
    model = patcher()
    before, stock = dict(model.model_options), sample(model)
    clone, ours = on(model)
    other = clone.clone().clone()  # LoRA and shift nodes behind it clone on
    accelerated = sample(clone)
    assert torch.equal(sample(other), accelerated)
    assert sampling.accelerated(other) is ours and sampling.accelerated(model) is None
    assert model.model_options == before and not any(model.wrappers.values())
    assert not model.model.diffusion_model._forward_hooks
    assert torch.equal(sample(model), stock)
    sampling.take_off(other)
    assert torch.equal(sample(other), stock)
    again = ACCELERATE().accelerate(clone, "lossless")[0]  # the later node counts
    assert [len(x) for x in again.wrappers["outer_sample"].values()] == [1]
    torch.testing.assert_close(sample(again), stock, rtol=0, atol=1e-5)


def test_cond_and_uncond_in_one_batch_or_not():
    """The batching may change from step to step: a batch has caches of its own."""
    model = patcher()
    clone, ours = on(model)
    joined = sample(clone)
    apart = sample(clone, joined=lambda step: False)
    torch.testing.assert_close(apart, joined, rtol=0, atol=2e-5)
    assert {s["branch"] for s in ours.report.steps} == {"cond", "uncond"}
    mixed = sample(clone, joined=lambda step: step % 3 != 1)
    assert torch.isfinite(mixed).all()
    assert (mixed - sample(model)).abs().max() < 2 * (joined - sample(model)).abs().max() + 0.1


def test_samplings_of_other_shapes_lengths_and_prompts_do_not_meet():
    clone, ours = on(patcher())
    first = sample(clone)
    for shape, num_text in (((2, 4, 12, 14), 5), ((1, 4, 9, 11), 3), ((1, 4, 12, 14), 5)):
        last = sample(clone, shape=shape, num_text=num_text)
    assert torch.equal(first, last)
    sample(clone, sigmas=torch.linspace(0.7, 0, 5))  # denoise < 1
    assert len(ours.report.steps) == 4


def test_samplers_that_call_twice_a_step_and_backwards():
    model = patcher()
    clone, ours = on(model)
    stock, got = sample(model, fake.heun), sample(clone, fake.heun)
    assert {s["branch"] for s in ours.report.steps} == {"uncond+cond", "uncond+cond 2"}
    assert "d" in kinds(ours, "uncond+cond") and "d" in kinds(ours, "uncond+cond 2")
    assert 0 < (got - stock).abs().max() < 1
    sample(clone, sigmas=SIGMAS.flip(0))  # noise is put back in: steps still count up
    assert [s["step"] for s in ours.report.steps] == list(range(10))


@pytest.mark.parametrize("cls", [fake.Flux, fake.WanModel])
@pytest.mark.parametrize("recipe", ["fbcache:threshold=9", "easycache:threshold=9"])
def test_recipes_that_decide_as_they_go(cls, recipe):
    """In front of a step, or behind its first block; the next sampling decides anew."""
    model = patcher(cls)
    clone, ours = on(model, recipe)
    sample(clone)  # the first one learns what blocks return: its last bits may be others
    stock, got = sample(model), sample(clone)
    left_out = [step for step in ours.report.steps if step["kind"] == "dispatch"]
    assert ours.report.flops_skipped > 0.3 and len(left_out) > 2
    first = 1.0 if recipe.startswith("fbcache") else 0.0
    assert all([k > 0 for k in s["executed"]] == [first > 0, *[False] * (len(s["executed"]) - 1)]
               for s in left_out)  # fmt: skip
    assert got.isfinite().all() and not torch.equal(got, stock)
    assert torch.equal(sample(clone), got) and torch.equal(sample(model), stock)


def test_a_call_without_options_runs_dense(caplog):
    """Of a node that calls the model itself; said once."""
    model = patcher()
    clone, ours = on(model)
    stock, call = sample(model), ours.call

    def without(executor, *args, **kwargs):
        hidden = [x for x in (*args, *kwargs.values()) if sampling._is_options(x)]
        for options in hidden:
            kinds = options.pop("cond_or_uncond")
        try:
            return call(executor, *args, **kwargs)
        finally:
            for options in hidden:
                options["cond_or_uncond"] = kinds

    clone.remove_wrappers_with_key(sampling.DIFFUSION_MODEL, sampling.KEY)
    clone.add_wrapper_with_key(sampling.DIFFUSION_MODEL, sampling.KEY, without)
    assert torch.equal(sample(clone), stock)
    assert caplog.text.count("says no step or conditioning: it runs dense") == 1


def test_an_interrupted_sampling_leaves_nothing():
    model = patcher()
    clone, ours = on(model)
    expected = sample(clone)

    def interrupted(f, x, sigmas):
        f(x, sigmas[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(clone, interrupted)
    assert ours._now is None and torch.equal(sample(clone), expected)


def test_errors_are_in_the_nodes_words():
    model, node = patcher(), ACCELERATE()
    with pytest.raises(ValueError, match=r"input overrides: .*interval"):
        node.accelerate(model, "fora", "interval=0")
    with pytest.raises(ValueError, match=r"input recipe_file: .*nowhere\.json"):
        node.accelerate(model, "fora", "", "nowhere.json")
    with pytest.raises(ValueError, match="overrides are of a named recipe"):
        node.accelerate(model, "fora", "interval=2", "nowhere.json")
    with pytest.raises(ValueError, match=r"does not run in ComfyUI: .*teacache"):
        node.accelerate(model, "teacache")
    with pytest.raises(ValueError, match=r"FlashOmni Accelerate: front . back"):
        node.accelerate(model, "dbcache")  # has too few blocks
    with pytest.raises(ValueError, match=r"Linear has no transformer blocks"):
        node.accelerate(fake.Patcher(torch.nn.Linear(2, 2)), "fora")
    with pytest.raises(ValueError, match="FlashOmni Report: model is not accelerated"):
        REPORT().report(model, {})
    with pytest.raises(ValueError, match="no sampling has run"):
        REPORT().report(node.accelerate(model, "fora")[0], {})
    clone = node.accelerate(model, "fora", "level=layers")[0]
    clone.set_model_patch_replace(lambda args, extra: None, "dit", "single_block", 1)
    with pytest.raises(RuntimeError, match=r"another node replaces block \('single_block', 1\)"):
        sample(clone)
    with pytest.raises(RuntimeError, match="calls no block patches"):
        sample(node.accelerate(patcher(offers_patches=False), "fora", "level=layers")[0])


def test_report_is_a_picture_and_a_text():
    clone, ours = on(patcher())
    latent = {"samples": sample(clone)}
    result = REPORT().report(clone, latent)["result"]
    assert result[0] is latent and "FLOPs skipped" in result[2]
    image = result[1]
    assert image.dtype == torch.float32 and image.ndim == 4 and image.shape[::3] == (1, 3)
    assert image.min() >= 0 and image.max() <= 1 and image.shape[1] >= picture.HEIGHT
    density = picture.density(ours.report)
    assert density.shape == (4, 10)
    columns = ["d" if not column.any() else "c" for column in density.T]
    assert columns == ["d" if kind == "d" else "c" for kind in kinds(ours)]


def test_tune_takes_what_skips_most_within_the_error():
    model = patcher()
    inputs = {
        "noise": fake.noise(), "guider": fake.Guider(model), "sampler": fake.euler,
        "sigmas": SIGMAS, "latent_image": {"samples": torch.zeros(1, 4, 12, 14)},
    }  # fmt: skip
    recipes = f"lossless\n{FORA},interval=2\n\n{FORA},interval=4"
    loose = TUNE().tune(**inputs, max_error=1.0, recipes=recipes)
    assert loose[1] == f"{FORA},interval=4" and "<- taken" in loose[2]
    assert sampling.accelerated(loose[0]).recipe == Recipe.of(loose[1])
    tight = TUNE().tune(**inputs, max_error=1e-4, recipes=recipes)
    assert tight[1] == "lossless"
    none = TUNE().tune(**inputs, max_error=0.0, recipes=f"{FORA},interval=2")
    assert none[1] == "" and sampling.accelerated(none[0]) is None
    assert sampling.accelerated(model) is None and inputs["guider"].model_patcher is model
    with pytest.raises(ValueError, match="FlashOmni Tune: recipe must be"):
        TUNE().tune(**inputs, max_error=1.0, recipes="nothing")


# Nodes of ComfyUI that the workflows use: inputs and number of outputs.
THEIRS = {
    "UNETLoader": ("unet_name weight_dtype", 1),
    "CLIPLoader": ("clip_name type", 1),
    "DualCLIPLoader": ("clip_name1 clip_name2 type", 1),
    "VAELoader": ("vae_name", 1),
    "CLIPTextEncode": ("clip text", 1),
    "FluxGuidance": ("conditioning guidance", 1),
    "ConditioningZeroOut": ("conditioning", 1),
    "EmptySD3LatentImage": ("width height batch_size", 1),
    "EmptyHunyuanLatentVideo": ("width height length batch_size", 1),
    "ModelSamplingSD3": ("model shift", 1),
    "KSampler": (
        "model positive negative latent_image seed steps cfg sampler_name scheduler denoise", 1
    ),
    "BasicGuider": ("model conditioning", 1),
    "BasicScheduler": ("model scheduler steps denoise", 1),
    "KSamplerSelect": ("sampler_name", 1),
    "RandomNoise": ("noise_seed", 1),
    "SamplerCustomAdvanced": ("noise guider sampler sigmas latent_image", 2),
    "VAEDecode": ("samples vae", 1),
    "SaveImage": ("images filename_prefix", 0),
    "SaveAnimatedWEBP": ("images filename_prefix fps lossless quality method", 0),
    "PreviewImage": ("images", 0),
    "PreviewAny": ("source", 0),
}  # fmt: skip


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "workflows").glob("*.json")), ids=lambda p: p.stem
)
def test_workflows_name_nodes_and_inputs_that_are_there(path):
    graph = json.loads(path.read_text("utf-8"))
    used = {node["class_type"] for node in graph.values()}
    assert used & set(nodes.NODE_CLASS_MAPPINGS)
    for node in graph.values():
        kind, given = node["class_type"], node["inputs"]
        if kind in nodes.NODE_CLASS_MAPPINGS:
            said = nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
            required, every = (
                set(said["required"]),
                set(said["required"]) | set(said.get("optional", ())),
            )
            assert required <= set(given) <= every, kind
        else:
            assert set(given) == set(THEIRS[kind][0].split()), kind
        for value in given.values():
            if isinstance(value, list):
                source = graph[value[0]]["class_type"]
                ours = nodes.NODE_CLASS_MAPPINGS.get(source)
                count = len(ours.RETURN_TYPES) if ours else THEIRS[source][1]
                assert 0 <= value[1] < count, (kind, value)
        if kind == "FlashOmniAccelerate":
            assert given["recipe"] in ACCELERATE.INPUT_TYPES()["required"]["recipe"][0]
            ACCELERATE().accelerate(patcher(), given["recipe"], given["overrides"])


def test_the_folder_imports_nothing_of_comfyui():
    for path in (*FOLDER.rglob("*.py"), *(FOLDER.parents[1] / "src").rglob("*.py")):
        text = path.read_text("utf-8")
        assert "import comfy" not in text and "from comfy" not in text, path
