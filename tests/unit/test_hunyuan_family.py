"""Hunyuan's models: masks of any kind, an image or none, a second encoder, and their variants."""

import pytest
import torch
from tiny_models import fill_gates

import flashomni
from conftest import ONES, call, first_item
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")
V15, IMAGE = "HunyuanVideo15Transformer3DModel", "HunyuanImageTransformer2DModel"
VIDEO, PACK = "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"
HOLES = (torch.arange(75) % torch.tensor([[2], [3]]) != 0).long()


def changed(name, config=None, **inputs):
    adapter = adapters()[name]
    model, given = adapter.tiny()
    if config:
        model = model.from_config({**adapter.sizes["tiny"], **config})
    return model, {**given, **inputs}


def second_encoder():
    text = torch.randn(2, 20, 20)
    mask = (torch.arange(20) < torch.tensor([[7], [20]])).long()
    more = {"encoder_hidden_states_2": text, "encoder_attention_mask_2": mask}
    return changed(IMAGE, {"text_embed_2_dim": 20}, **more)


def refiner():
    """Of HunyuanImage: the same class, with a frame."""
    config = {"patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6)}
    return changed(IMAGE, config, hidden_states=torch.randn(2, 4, 1, 18, 19))


def one_framepack():
    model, inputs = changed(PACK)
    inputs["encoder_attention_mask"][0, 50:] = 0
    return model, first_item(inputs)


VARIANTS = {
    "1.5, text to video": lambda: changed(V15, image_embeds=torch.zeros(2, 11, 12)),
    "1.5, holes": lambda: changed(V15, encoder_attention_mask=HOLES),
    "image, holes": lambda: changed(IMAGE, encoder_attention_mask=HOLES),
    "image, all valid": lambda: changed(IMAGE, encoder_attention_mask=torch.ones(2, 75).long()),
    "image, two encoders": second_encoder,
    "image, guided": lambda: changed(IMAGE, {"guidance_embeds": True}, guidance=torch.ones(2)),
    "image, refiner": refiner,
    "framepack, one item": one_framepack,
}


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_exact(variant, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    torch.manual_seed(0)
    model, inputs = VARIANTS[variant]()
    fill_gates(model.eval())
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(5):
            engine.step(step, 8)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
        assert engine.report().tier == "adapter"
    assert torch.equal(call(model, inputs), stock)


def test_a_refiner_has_frames():
    model, inputs = refiner()
    assert adapters()[IMAGE].geometry(model, inputs).shape == (1, 18, 19)


def test_framepack_does_not_tell_its_shape():
    model, inputs = changed(PACK)
    told = adapters()[PACK].geometry(model, inputs)
    assert told.shape is None and "earlier frames" in told.why


def test_a_first_frame_that_is_replaced_goes_without_the_adapter():
    """Its blocks modulate that frame apart: the model is learned, and the report says why."""
    torch.manual_seed(0)
    model, inputs = changed(VIDEO, {"image_condition_type": "token_replace"})
    fill_gates(model.eval())
    stock = call(model, inputs)
    with flashomni.accelerate(model, "fora:warmup=0,level=layers") as engine:
        for step in range(5):
            engine.step(step, 8)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
        report = engine.report()
    assert report.tier == "declared" and any("token_replace" in note for note in report.notes)
