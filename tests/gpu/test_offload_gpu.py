"""Group offloading on a card: weights that a stream fetches ahead, and what stays on the card."""

import copy

import pytest
import torch

import flashomni
from conftest import STEPS, generation
from flashomni.engine import Recipe
from flashomni.models import Blocks, adapters
from flashomni.policies import make_policy
from memory_features import MOVED, STREAMED, watch_moves

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]

DEVICE = torch.device("cuda")
FORA = Recipe.of("fora", interval=3, warmup=0.0, level="layers")
TILES = Recipe.of(make_policy("topk", q_density=0.5, kv_density=0.6), interval=3, warmup=0.0)
OPTIONS = {"A": {"blocks": Blocks()}, "C": {}}


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval(), {name: value.cuda() for name, value in inputs.items()}


def made(model, inputs, tier, put=None):
    """What two recipes and the stock model give; ``put`` offloads in between."""
    found = []
    for recipe in ("lossless", FORA, TILES):
        with flashomni.accelerate(model, recipe, **OPTIONS[tier]) as engine:
            if put is not None:
                put, _ = None, put(model, DEVICE)
            found.append(generation(engine, model, inputs, STEPS))
    return found


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("tier", OPTIONS)
@pytest.mark.parametrize("feature", [*MOVED, *STREAMED])
def test_the_same_pictures_and_no_weights_left(flux, feature, tier, first):
    """Bits of whole layers; within rounding where Linears have hooks of their own.

    A hooked Linear is called whole: its tiles are, and on a card GELU is no part of it.
    """
    stock, inputs = flux
    expected = made(copy.deepcopy(stock).cuda(), inputs, tier)
    model, put = copy.deepcopy(stock), {**MOVED, **STREAMED}[feature]
    if first:
        put(model, DEVICE)
    elif feature in STREAMED or feature.startswith("group"):
        model.cuda()
    found = made(model, inputs, tier, None if first else put)
    hooked = tier == "C" and ("leaves" in feature or "leaf" in feature or "sequential" in feature)
    near = {"atol": 1e-5, "rtol": 1e-5} if hooked else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(found[:2], expected[:2], **near)
    torch.testing.assert_close(found[2], expected[2], atol=2e-3, rtol=2e-3)
    if feature != "model offloading":
        on_card = [name for name, p in model.named_parameters() if p.is_cuda]
        assert len({name.rpartition(".")[0] for name in on_card}) <= 12, on_card


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("feature", STREAMED)
def test_outputs_are_kept_from_the_first_call_on(flux, feature, first):
    """In it the hook of the stream goes, and puts back the forward of the model that it found."""
    stock, inputs = flux
    recipe, found = FORA.replace(level="output"), []
    for put in (None, STREAMED[feature]):
        model = copy.deepcopy(stock)
        if put is None or not first:
            model.cuda()
        elif first:
            put(model, DEVICE)
        with flashomni.accelerate(model, recipe) as engine:
            if put is not None and not first:
                put(model, DEVICE)
            found.append([generation(engine, model, inputs, STEPS) for _ in range(2)])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tier", OPTIONS)
def test_steps_that_are_cached_bring_no_blocks(flux, tier, monkeypatch):
    """Only what is around the blocks comes, and the first block, which diffusers fetches ahead."""
    stock, inputs = flux
    model, counts = copy.deepcopy(stock), []
    STREAMED["group offloading with a stream, blocks"](model, DEVICE)
    found = watch_moves(monkeypatch)
    with flashomni.accelerate(model, FORA.replace(interval=9), **OPTIONS[tier]) as engine:
        for step in range(6):
            found.clear()
            engine.step(step, 12)
            model(**inputs)
            counts.append(found.count("onload_"))
    assert counts[0] > 4 and max(counts[3:]) <= 2, counts


WAYS = {
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group": lambda pipe: pipe.enable_group_offload(
        onload_device=DEVICE, offload_type="leaf_level", use_stream=True
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_pipeline(way, first):
    """As users call it: the picture is that of the pipeline that fits on the card."""
    from flashomni.lab import zoo

    def picture(offload):
        torch.manual_seed(0)
        loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=64, dual=1, single=2)
        pipe = loaded.pipe
        pipe.set_progress_bar_config(disable=True)
        if offload is None:
            pipe.to("cuda")
        elif first:
            offload(pipe)
        with flashomni.accelerate(pipe, FORA):
            if offload is not None and not first:
                offload(pipe)
            arguments = {**loaded.call, "height": 128, "width": 144, "num_inference_steps": 8}
            seed = torch.Generator().manual_seed(0)
            return pipe("a red circle", **arguments, output_type="pt", generator=seed)[0].cpu()

    torch.testing.assert_close(picture(WAYS[way]), picture(None), atol=2e-3, rtol=2e-3)


def test_caches_keep_to_the_memory_that_is_given(flux):
    """Histories of tiles go to the host before orders go down; the bytes are what was said."""
    stock, inputs = flux
    model = copy.deepcopy(stock).cuda()
    with flashomni.accelerate(model, TILES.replace(order=1)) as engine:
        generation(engine, model, inputs, STEPS)
        full = engine.report().cache_bytes
    with flashomni.accelerate(model, TILES.replace(order=1), memory=full // 4) as engine:
        generation(engine, model, inputs, STEPS)
        report = engine.report()
    assert report.cache_bytes <= full // 4
    assert any("history_dtype=float8" in note for note in report.notes)
