"""Frames, rows and columns reach the policy without the user saying so, for every adapter."""

import logging

import pytest
import torch

import flashomni
from conftest import RELATIVES, call
from flashomni.models import Geometry, adapters
from flashomni.models.blocks.positions import of_image_shapes, of_position_ids
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

SHAPES = {  # of the models' tiny inputs, no two sizes equal
    "Flux2Transformer2DModel": (1, 18, 19),
    "FluxTransformer2DModel": (1, 18, 19),
    "BriaTransformer2DModel": (1, 18, 19),
    "OvisImageTransformer2DModel": (1, 18, 19),
    "LTX2VideoTransformer3DModel": (5, 9, 7),
    "LTXVideoTransformer3DModel": (5, 9, 7),
    "LongCatImageTransformer2DModel": (1, 18, 19),
    "QwenImageTransformer2DModel": (1, 18, 19),
    "HunyuanImageTransformer2DModel": (1, 18, 19),
    "HunyuanVideo15Transformer3DModel": (5, 9, 7),
    "HunyuanVideoTransformer3DModel": (5, 9, 7),
    "WanTransformer3DModel": (5, 9, 7),
    "ChronoEditTransformer3DModel": (5, 9, 7),
    "SkyReelsV2Transformer3DModel": (5, 9, 7),
    "WanAnimateTransformer3DModel": (5, 9, 7),
    "WanVACETransformer3DModel": (5, 9, 7),
    "ZImageTransformer2DModel": (1, 18, 16),
    "SD3Transformer2DModel": (1, 18, 19),
    "CogVideoXTransformer3DModel": (5, 9, 7),
    "CogView4Transformer2DModel": (1, 18, 19),
}
WANTS = ("window", {"reach": 0.2})


def tiny_of(name):
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    return model.eval(), dict(inputs)


def grids(model, inputs, policy, monkeypatch, **settings):
    """The grids that the policy is shown in a short generation."""
    seen, chosen = [], type(make_policy(policy, **settings))
    plain = chosen.__call__
    monkeypatch.setattr(
        chosen, "__call__", lambda self, site: (seen.append(site.grid), plain(self, site))[1]
    )
    recipe = flashomni.Recipe.of(make_policy(policy, **settings), warmup=0.0, interval=2)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(4):
            engine.step(step, 4)
            out = call(model, inputs)
    assert torch.isfinite(out).all() and seen
    return seen


def ids(height, width, kind=0.0, start=(0, 0)):
    rows, columns = torch.arange(height) + start[0], torch.arange(width) + start[1]
    return torch.cartesian_prod(torch.tensor([kind]), rows.float(), columns.float())


def four(*parts):
    """FLUX.2's positions: a fourth axis, which images do not use."""
    return torch.nn.functional.pad(torch.cat(parts), (0, 1))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("policy", ["window", "radial"])
def test_every_adapter_tells_its_shape(name, policy, monkeypatch):
    """To each block, dual and single, in raster order; radial needs no frames any more."""
    assert set(SHAPES) >= {one for one in adapters() if adapters()[one].sizes} - RELATIVES
    model, inputs = tiny_of(name)
    for grid in grids(model, inputs, policy, monkeypatch):
        assert grid.shape == SHAPES[name] and grid.order == "raster" and not grid.spans


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith(("Flux", "LongCat"))])
def test_a_reference_image_is_not_generated(name, monkeypatch):
    """FLUX Kontext, FLUX.2 and LongCat-Image-Edit: its tokens follow, of another kind and size."""
    model, inputs = tiny_of(name)
    places = ids(11, 13, 1.0, (512, 512)), ids(4, 7, 2.0, (512, 512))
    inputs["img_ids"] = four(*places) if name.startswith("Flux2") else torch.cat(places)
    inputs["hidden_states"] = torch.randn(2, 11 * 13 + 4 * 7, 16)
    for grid in grids(model, inputs, "window", monkeypatch):
        assert grid.shape == (1, 11, 13)
        assert grid.spans == (("reference", 77 + 143, 77 + 171),)


def test_reference_images_of_qwen_image_edit(monkeypatch):
    """img_shapes names each; they lie between the generated tokens and the text."""
    model, inputs = tiny_of("QwenImageTransformer2DModel")
    inputs["img_shapes"] = [[(1, 11, 13), (1, 4, 7), (1, 3, 5)]] * 2
    inputs["hidden_states"] = torch.randn(2, 143 + 28 + 15, 16)
    for grid in grids(model, inputs, "window", monkeypatch):
        assert grid.shape == (1, 11, 13) and grid.spans == (("reference", 143, 186),)


def test_what_the_user_says_wins(monkeypatch):
    """radial:frames=2 on a video of 5 frames; nothing is read for it."""
    model, inputs = tiny_of("HunyuanVideoTransformer3DModel")
    seen = grids(model, inputs, "radial", monkeypatch, frames=2)
    assert all(grid.shape is None for grid in seen)


@pytest.mark.parametrize("policy", ["flashomni", "topk", "dense"])
def test_who_does_not_look_reads_nothing(policy, monkeypatch):
    """Position ids are values of tensors: reading them synchronises, which presets never do."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    flux = type(adapters()["FluxTransformer2DModel"])
    monkeypatch.setattr(flux, "geometry", lambda *_: pytest.fail("was asked"))
    assert all(grid.shape is None for grid in grids(model, inputs, policy, monkeypatch))


def test_ids_are_read_once_a_generation(monkeypatch):
    """By the first call; the next generation has another size."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    flux = type(adapters()["FluxTransformer2DModel"])
    plain, asked = flux.geometry, []
    monkeypatch.setattr(flux, "geometry", lambda *a: (asked.append(1), plain(*a))[1])
    recipe = flashomni.Recipe.of(make_policy("window"), warmup=0.0, interval=2)
    with flashomni.accelerate(model, recipe) as engine:
        for size in ((18, 19), (9, 12)):
            inputs["img_ids"] = ids(*size)
            inputs["hidden_states"] = torch.randn(2, size[0] * size[1], 16)
            for step in range(4):
                engine.step(step, 4)
                call(model, inputs)
    assert len(asked) == 2


def test_a_model_that_does_not_tell_is_named(monkeypatch, caplog):
    """window goes along the sequence, and says why; radial asks for its frames."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    inputs["img_ids"] = inputs["img_ids"][torch.randperm(342)]
    with caplog.at_level(logging.WARNING, "flashomni"):
        assert all(grid.shape is None for grid in grids(model, inputs, "window", monkeypatch))
    assert len(caplog.messages) == 1
    assert "policy window" in caplog.text and "FluxTransformer2DModel" in caplog.text
    assert "img_ids does not number the rows and columns of one image in order" in caplog.text
    with pytest.raises(ValueError, match="frames of policy radial must be set"):
        grids(model, inputs, "radial", monkeypatch)


@pytest.mark.parametrize(
    ("told", "shape", "references"),
    [
        (of_position_ids(ids(3, 5)), (1, 3, 5), 0),
        (of_position_ids(ids(3, 5)[None].expand(2, -1, -1)), (1, 3, 5), 0),
        (of_position_ids(ids(1, 1)), (1, 1, 1), 0),
        (of_position_ids(ids(64, 48).bfloat16()), (1, 64, 48), 0),
        (of_position_ids(torch.cat([ids(3, 5), ids(3, 5, 1.0)])), (1, 3, 5), 15),
        (of_position_ids(ids(3, 5).flip(0)), None, 0),
        (of_position_ids(ids(3, 5)[:-1]), None, 0),
        (of_position_ids(ids(3, 400).bfloat16()), None, 0),  # rounds its columns
        (of_position_ids(None), None, 0),
        (of_position_ids(torch.zeros(6, 4)), None, 0),
        (of_position_ids(torch.zeros(6, 5)), None, 0),
        (of_position_ids(four(ids(3, 5))), (1, 3, 5), 0),
        (of_position_ids(four(ids(3, 5), ids(2, 2, 10.0))), (1, 3, 5), 4),
        (of_position_ids(torch.cat([ids(3, 5), ids(1, 15)[:, 2:]], 1)), None, 0),
        (of_image_shapes([(1, 4, 6)] * 2), (1, 4, 6), 0),
        (of_image_shapes([[(1, 4, 6)], [(1, 6, 4)]]), None, 0),
        (of_image_shapes(None), None, 0),
        (of_image_shapes([]), None, 0),
    ],
)
def test_what_is_told(told, shape, references):
    """A shape that holds for every token, or none and a reason."""
    assert (told.shape, told.references) == (shape, references)
    assert shape is not None or told.why


def test_other_tokens_than_known_have_no_place():
    """A stream that the geometry is not about is left alone."""
    geometry = Geometry((1, 3, 5), 4)
    place = {"shape": (1, 3, 5), "spans": (("reference", 22, 26),), "order": "raster"}
    assert geometry.place(7, 19) == place
    assert geometry.place(7, 18) == {} and Geometry().place(0, 15) == {}
