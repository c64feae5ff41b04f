"""Steps as CUDA graphs: the same bits as without, in every order in which generations may come."""

import pytest
import torch

import flashomni
from conftest import ONES, SPARSE, STEPS, call, generation
from flashomni.models import adapters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("no_grad"),
]
CACHING = "taylorseer:interval=3,warmup=0.2,level=layers"
MODELS = ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "wide"]


def wide():
    """FLUX with heads of 128, for the kernels of a Hopper card, in bf16."""
    from diffusers import FluxTransformer2DModel

    sizes = adapters()["FluxTransformer2DModel"].sizes["tiny"]
    heads = {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    _, inputs = adapters()["FluxTransformer2DModel"].tiny()
    model = FluxTransformer2DModel(**{**sizes, **heads}).to(torch.bfloat16)
    return model, {k: v if "ids" in k else v.to(torch.bfloat16) for k, v in inputs.items()}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = wide() if request.param == "wide" else adapters()[request.param].tiny()
    return made[0].eval().to("cuda"), {k: v.to("cuda") for k, v in made[1].items()}


def latents_of(inputs):
    return torch.randn_like(inputs["hidden_states"])


@pytest.mark.parametrize(
    "recipe", [ONES, SPARSE, CACHING, "balanced"], ids=["ones", "tiles", "whole", "balanced"]
)
def test_every_generation_is_the_same_bits(model, recipe):
    """Alone, in turn with another, and in two branches."""
    model, first = model
    both = [first, {**first, "hidden_states": latents_of(first)}]
    with flashomni.accelerate(model, recipe, graphs=False) as engine:
        alone = [generation(engine, model, each) for each in both]
    with flashomni.accelerate(model, recipe, graphs=True) as engine:
        graphs = engine._runtime.graphs
        for index in (0, 0, 1, 0, 1):
            assert torch.equal(generation(engine, model, both[index]), alone[index])
        assert graphs.replays == 4 * STEPS, engine.report().notes
        for round_ in range(3):
            latents = {(i, b): both[i]["hidden_states"] for i in (0, 1) for b in "ab"}
            for step in range(STEPS):
                for (i, branch), x in latents.items():
                    engine.step(step, STEPS, branch, generation=f"{round_} {i}")
                    out = call(model, {**both[i], "hidden_states": x})
                    assert torch.equal(out, alone[i][step])
                    latents[i, branch] = x - 0.05 * out
        assert graphs.replays == (4 + 8) * STEPS
    assert not graphs._slots


def test_a_replay_waits_for_nothing(model):
    model, inputs = model
    with flashomni.accelerate(model, SPARSE, graphs=True) as engine:
        for _ in range(3):
            expected = generation(engine, model, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = generation(engine, model, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(outputs, expected)


def test_a_model_that_reads_a_value_goes_on_without(model):
    """The attempt leaves nothing behind; the report says what it was."""
    model, inputs = model
    stock = type(model.proj_out).forward

    class Reads(type(model.proj_out)):
        def forward(self, x):
            float(x.sum())
            return stock(self, x)

    model.proj_out.__class__ = Reads
    with flashomni.accelerate(model, SPARSE, graphs=False) as engine:
        expected = generation(engine, model, inputs)
    with flashomni.accelerate(model, SPARSE, graphs=True) as engine:
        for _ in range(4):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert any("reads a value back" in note for note in engine.report().notes)
        assert not engine._runtime.graphs.replays
