"""Z-Image: captions and pictures of several lengths in a batch, padding, and its variants."""

import pytest
import torch
from tiny_models import fill_gates

import flashomni
from conftest import ONES, call
from flashomni.engine import Recipe
from flashomni.models import Blocks, adapters

pytestmark = pytest.mark.usefixtures("no_grad")

NAME = "ZImageTransformer2DModel"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")


def pictures(*sizes):
    return [torch.randn(4, 1, *size) for size in sizes]


def captions(*lengths):
    return [torch.randn(length, 24) for length in lengths]


BATCHES = {
    "padded pictures": lambda: {"x": pictures((18, 26), (18, 26)), "cap_feats": captions(40, 33)},
    "ragged captions": lambda: {"x": pictures((24, 16), (24, 16)), "cap_feats": captions(77, 5)},
    "ragged pictures": lambda: {"x": pictures((18, 26), (24, 30)), "cap_feats": captions(9, 70)},
    "alone": lambda: {"x": pictures((22, 26)), "cap_feats": captions(64), "t": torch.tensor([0.5])},
}


def tiny(batch):
    torch.manual_seed(0)
    model, inputs = adapters()[NAME].tiny()
    fill_gates(model)
    return model.eval(), {**inputs, **BATCHES[batch]()}


def outputs(model, inputs):
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch_is_exact(batch, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    model, inputs = tiny(batch)
    stock = outputs(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(6):
            engine.step(step, 8)
            for got, expected in zip(outputs(model, inputs), stock, strict=True):
                torch.testing.assert_close(got, expected, **CLOSE)
        assert engine.report().tier == "adapter"
    for got, expected in zip(outputs(model, inputs), stock, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("batch", ["padded pictures", "alone"])
def test_orders_and_shapes_know_the_padding(batch):
    """Padding of the picture is none of its tokens."""
    model, inputs = tiny(batch)
    stock = outputs(model, inputs)
    recipe = Recipe.of("window:reach=1", warmup=0.0, interval=2)
    for order in ("raster", "hilbert"):
        with flashomni.accelerate(model, recipe, token_order=order) as engine:
            for step in range(4):
                engine.step(step, 5)
                for got, expected in zip(outputs(model, inputs), stock, strict=True):
                    torch.testing.assert_close(got, expected, **CLOSE)


def test_pictures_of_several_sizes_have_no_shape():
    model, inputs = tiny("ragged pictures")
    told = adapters()[NAME].geometry(model, inputs)
    assert told.shape is None and "several sizes" in told.why


def test_a_controlnet_adds_between_layers():
    """What it adds is not cached with a layer; in another order of tokens it is refused."""
    model, inputs = tiny("ragged captions")
    added = {index: torch.randn(2, 192, 48) for index in (0, 2)}
    inputs["controlnet_block_samples"] = {i: x[:, : 96 + 96] for i, x in added.items()}
    stock = torch.stack(outputs(model, inputs))
    with flashomni.accelerate(model, "fora:warmup=0,level=layers") as engine:
        for step in range(5):
            engine.step(step, 8)
            torch.testing.assert_close(torch.stack(outputs(model, inputs)), stock, **CLOSE)
    with flashomni.accelerate(model, "fora:warmup=0,level=layers", token_order="tile") as engine:
        engine.step(0, 8)
        with pytest.raises(NotImplementedError, match="with controlnet_block_samples"):
            outputs(model, inputs)


def omni():
    """A model that takes given images as well, and the arguments of such a call."""
    from diffusers import ZImageTransformer2DModel

    given = ZImageTransformer2DModel(**adapters()[NAME].sizes["tiny"], siglip_feat_dim=20).eval()
    call = {
        "x": [[*pictures((16, 16)), *pictures((18, 14))]],
        "cap_feats": [captions(20, 12, 3)],
        "siglip_feats": [[torch.randn(3, 4, 20), None]],
        "image_noise_mask": [[0, 1]],
        "t": torch.tensor([0.5]),
    }
    return given, call


def test_given_images_go_without_the_adapter():
    """Z-Image-Omni is learned, and the report says so; its plain calls are exact as well."""
    model, inputs = omni()
    stock = outputs(model, inputs)[0]
    with flashomni.accelerate(model, "fora:warmup=0,level=layers") as engine:
        for step in range(5):
            engine.step(step, 8)
            torch.testing.assert_close(outputs(model, inputs)[0], stock, **CLOSE)
        report = engine.report()
    assert report.tier == "generic" and any("Z-Image-Omni" in note for note in report.notes)


def test_a_mask_of_noise_is_refused():
    """Where a plain model gets given images all the same; without the adapter it runs."""
    model, _ = tiny("alone")
    inputs = {**omni()[1], "siglip_feats": [None]}
    stock = outputs(model, inputs)[0]
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 4)
        with pytest.raises(NotImplementedError, match="noise_mask of ZImageTransformer2DModel"):
            outputs(model, inputs)
    with flashomni.accelerate(model, "lossless", blocks=Blocks()) as engine:
        engine.step(0, 4)
        torch.testing.assert_close(outputs(model, inputs)[0], stock, **CLOSE)


def test_lists_are_what_tensors_are():
    """The contract's arguments are tensors; pipelines give lists."""
    torch.manual_seed(0)
    model, inputs = adapters()[NAME].tiny()
    listed = {**inputs, "x": list(inputs["x"]), "cap_feats": list(inputs["cap_feats"])}
    assert torch.equal(call(model.eval(), inputs), call(model, listed))
