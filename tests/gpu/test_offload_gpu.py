"""Group offloading on a card: weights that a stream fetches ahead, and what stays on the card."""

import copy

import pytest
import torch

import flashomni
from conftest import STEPS, generation
from flashomni.engine import Recipe
from flashomni.models import Blocks, adapters
from flashomni.policies import make_policy
from memory_features import MOVED, STREAMED

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
    """Bits of whole layers; of tiles within rounding, where projections are called whole."""
    stock, inputs = flux
    expected = made(copy.deepcopy(stock).cuda(), inputs, tier)
    model, put = copy.deepcopy(stock), {**MOVED, **STREAMED}[feature]
    if first:
        put(model, DEVICE)
    elif feature in STREAMED or feature.startswith("group"):
        model.cuda()
    found = made(model, inputs, tier, None if first else put)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], atol=2e-3, rtol=2e-3)
    if feature != "model offloading":
        on_card = [name for name, p in model.named_parameters() if p.is_cuda]
        assert len({name.rpartition(".")[0] for name in on_card}) <= 12, on_card


@pytest.mark.parametrize("feature", [name for name in STREAMED if "blocks" in name])
def test_steps_that_are_cached_copy_nothing(flux, feature):
    """The card sees less of the host in a step whose layers are all cached."""
    stock, inputs = flux
    model = copy.deepcopy(stock)
    STREAMED[feature](model, DEVICE)
    weights = sum(p.numel() * 4 for p in model.parameters())
    with flashomni.accelerate(model, FORA.replace(interval=9)) as engine:
        for step in range(3):
            engine.step(step, 12)
            model(**inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        engine.step(3, 12)
        model(**inputs)
        copied = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    assert copied < weights / 2 + 16 * sum(x.nbytes for x in inputs.values())
