"""LTX's models: timesteps of single tokens, both streams, gates or none, and guidance of LTX-2."""

import pytest
import torch
from tiny_models import fill_gates

import flashomni
from conftest import ONES, SPARSE
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")
VIDEO, BOTH = "LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"
# LTX-2.0: neither gates nor modulation of what is read, angles of neighbours.
PLAIN = {
    "rope_type": "interleaved", "gated_attn": False, "cross_attn_mod": False,
    "audio_gated_attn": False, "audio_cross_attn_mod": False, "perturbed_attn": False,
}  # fmt: skip
TOKENS = torch.full((2, 5, 63), 500.0).index_fill(1, torch.tensor([0]), 0.0).flatten(1)


def changed(name, config=None, **inputs):
    adapter = adapters()[name]
    model, given = adapter.tiny()
    if config:
        model = model.from_config({**adapter.sizes["tiny"], **config})
    return model, {**given, **inputs}


def mask():
    """Pairs of tokens: the first frame does not see the others."""
    allowed = torch.ones(2, 315, 315)
    allowed[:, :63, 63:] = 0
    return allowed


VARIANTS = {
    "timesteps of tokens": lambda: changed(VIDEO, timestep=TOKENS),
    "no mask": lambda: changed(VIDEO, encoder_attention_mask=None),
    "LTX-2.0": lambda: changed(BOTH, PLAIN),
    "LTX-2.0, tokens": lambda: changed(BOTH, PLAIN, timestep=TOKENS, audio_timestep=torch.ones(2)),
    "LTX-2.3, tokens": lambda: changed(BOTH, timestep=TOKENS, audio_timestep=torch.ones(2)),
    "LTX-2.5": lambda: changed(BOTH, {"use_prompt_adaln_single": False}),
    "cross timesteps": lambda: changed(BOTH, use_cross_timestep=True),
    "streams apart": lambda: changed(BOTH, isolate_modalities=True),
    "all perturbed": lambda: changed(BOTH, spatio_temporal_guidance_blocks=[1]),
    "one perturbed": lambda: changed(
        BOTH, spatio_temporal_guidance_blocks=[0, 1], perturbation_mask=torch.tensor([0.0, 1.0])
    ),
    "pairs masked": lambda: changed(BOTH, video_self_attention_mask=mask()),
}


def build(variant):
    torch.manual_seed(0)
    model, inputs = VARIANTS[variant]()
    fill_gates(model.eval())
    return model, inputs


def outputs(model, inputs):
    """Of the video, and of the audio where there is some."""
    return model(**inputs, return_dict=False)


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_exact(variant, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    model, inputs = build(variant)
    stock = outputs(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(5):
            engine.step(step, 8)
            for got, expected in zip(outputs(model, inputs), stock, strict=True):
                torch.testing.assert_close(got, expected, **CLOSE)
        report = engine.report()
    assert report.tier == "adapter" and "dispatch" in {step["kind"] for step in report.steps}
    for got, expected in zip(outputs(model, inputs), stock, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", ["timesteps of tokens", "LTX-2.0, tokens", "LTX-2.3, tokens"])
def test_tokens_of_their_own_time_in_any_order(variant):
    """What goes with a token follows it: its modulation, its RoPE for the audio too."""
    model, inputs = build(variant)
    stock = outputs(model, inputs)
    with flashomni.accelerate(model, ONES, token_order="hilbert") as engine:
        for step in range(3):
            engine.step(step, 8)
            for got, expected in zip(outputs(model, inputs), stock, strict=True):
                torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("variant", ["all perturbed", "pairs masked"])
def test_orders_that_would_be_lost_are_refused(variant):
    model, inputs = build(variant)
    with flashomni.accelerate(model, ONES, token_order="tile") as engine:
        engine.step(0, 8)
        with pytest.raises(NotImplementedError, match="take token_order 'raster'"):
            outputs(model, inputs)


@pytest.mark.parametrize("name", [VIDEO, BOTH])
def test_sizes_that_do_not_fit_are_no_shape(name):
    """A video with tokens of conditions beside it, or with coordinates alone."""
    model, inputs = changed(name, num_frames=None, height=None, width=None)
    assert adapters()[name].geometry(model, inputs).shape is None
    more = {**inputs, "num_frames": 5, "height": 9, "width": 8}
    assert "do not number its tokens" in adapters()[name].geometry(model, more).why


@pytest.mark.slow
def test_guidance_that_perturbs_is_a_branch_of_its_own():
    """cond and the perturbed call in turn: each gives what it gives alone, with sparse steps."""
    model, inputs = build("LTX-2.5")
    perturbed = {**inputs, "spatio_temporal_guidance_blocks": [1]}
    alone = []
    for each in (inputs, perturbed):
        with flashomni.accelerate(model, SPARSE) as engine:
            alone.append([])
            for step in range(8):
                engine.step(step, 8)
                alone[-1].append(outputs(model, each))
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(8):
            for index, each in enumerate((inputs, perturbed)):
                engine.step(step, 8, ("cond", "uncond_stg")[index])
                for got, expected in zip(outputs(model, each), alone[index][step], strict=True):
                    assert torch.equal(got, expected)
