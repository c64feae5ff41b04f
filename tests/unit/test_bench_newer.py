"""Real sizes of later models, tried on small ones: tokens, calls, steps, and a recipe on each."""

import pytest
import torch

import flashomni
from flashomni.lab.e2e import models, newer
from flashomni.lab.e2e.run import generate

CPU = torch.device("cpu")
TINY = [name for name in newer.SIZES if name.startswith("tiny-")]


def test_published_sizes():
    """Tokens of the real models; what is not as published is said."""
    sizes = {name: size.tokens for name, size in newer.SIZES.items() if name not in TINY}
    assert sizes == {
        "flux2-1024": 4096 + 512,
        "z-image-1024": 4096 + 128,
        "qwen-image-1328": 83 * 83 + 256,
        "hunyuan15-720p": 31 * 45 * 80 + 256,
        "ltx2-768": 16 * 16 * 24,
    }
    assert [name for name, size in newer.SIZES.items() if size.note] == ["hunyuan15-720p"]
    assert set(newer.SIZES) <= set(models.MODELS) and len(TINY) == 5


@pytest.mark.parametrize("name", TINY)
def test_generations(name):
    """Every step is seen once, stops where it should, and the picture's tokens are as said."""
    model = models.build(name, CPU, torch.float32)
    size, seen, told = models.MODELS[name], set(), []
    block = flashomni.models.find_adapter(model.transformers[0]).sites(model.transformers[0])[-1]
    handle = block.block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add(next(iter([*args, *kwargs.values()])).shape[1]),
        with_kwargs=True,
    )
    run = generate(model, 4, lambda step, steps: told.append((step, steps)), stop_after=3)
    handle.remove()
    assert told == [(1, 3), (2, 3), (3, 3)] and len(run.calls) == 3 * model.calls
    picture = model.tokens - (size.text if size.joint else 0)
    assert len(seen) == 1 and seen <= {picture, model.tokens}
    with flashomni.accelerate(model.pipe, "fora:interval=2,warmup=0") as engine:
        generate(model, 4)
        report = engine.report()
    assert report.tier == "adapter" and len(report.steps) == 4 * model.calls
    assert {step["step"] for step in report.steps} == {0, 1, 2, 3}
    assert "dispatch" in {step["kind"] for step in report.steps}


def test_structure_needs_biases():
    """Queries and keys without one cannot be given a direction: refused, not left as they are."""
    for name in ("tiny-flux2", "tiny-z-image"):
        with pytest.raises(ValueError, match="structure must be 0 for"):
            models.build(name, CPU, torch.float32, structure=1.0)


def test_a_size_of_ones_own():
    """More blocks, less picture: the size says, not the name."""
    size = models.MODELS["tiny-wan22"]
    deep = type(size)("wan22", {**size.config, "num_layers": 3}, 77, 77, 64, 64, 5, joint=False)
    model = models.build("tiny-wan22", CPU, torch.float32, size=deep)
    assert [len(each.blocks) for each in model.transformers] == [3, 3]
    assert model.tokens == 2 * 4 * 4 and len(generate(model, 2).calls) == 4
