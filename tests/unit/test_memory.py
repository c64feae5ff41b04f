"""``accelerate(..., memory=...)``: what is kept is foreseen, and lowered until it fits."""

import dataclasses
import itertools
import logging

import pytest
import torch
from tiny_models import build, output

import flashomni
from conftest import call, generation
from flashomni.engine import Recipe
from flashomni.engine.memory import Bytes, Shapes, kept_bytes, ladder, parse_bytes
from flashomni.models import adapters, find_adapter
from flashomni.models._memory import call_shapes
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

TILES = Recipe.of(
    make_policy("topk", q_density=0.5, kv_density=0.6), interval=3, warmup=0.0, order=1
)
WHOLE = Recipe.of("taylorseer", level="layers", interval=2, warmup=0.0)
OUTPUT = Recipe.of("taylorseer", interval=2, warmup=0.0)
CARRY = TILES.replace(
    interval=1, in_computed=True, choose_at=[1], dense_steps=2, carry="hold", refresh=3
)
MODELS = ["FluxTransformer2DModel", "WanTransformer3DModel"]


def tiny(name):
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    return model.eval(), inputs


def kept(model, inputs, recipe, **options):
    with flashomni.accelerate(model, recipe, **options) as engine:
        generation(engine, model, inputs, 6)
        return engine.report(), engine.recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [("auto", None), ("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), (1000, 1000)],
)
def test_sizes(text, size):
    """As people write them."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "4XB", "-1GB", "", 0, True, "0GB", 1.5e9j])
def test_other_sizes_are_refused(text):
    """By what is allowed."""
    with pytest.raises(ValueError, match=r"memory must be 'auto', a number of bytes, or a size"):
        parse_bytes(text)


@pytest.mark.parametrize("recipe", [TILES, WHOLE, OUTPUT], ids=["tiles", "layers", "output"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_foreseen_is_what_is_kept(name, recipe):
    """Nearly: never less than the engine holds at its peak, and not half as much again."""
    model, inputs = tiny(name)
    shapes = call_shapes(model, find_adapter(model).sites(model), inputs)
    foreseen = kept_bytes(recipe, shapes, "cpu")
    report, _ = kept(model, inputs, recipe)
    assert report.cache_bytes <= foreseen.device <= 1.5 * report.cache_bytes
    assert foreseen.host == 0


TOPK = {"name": "topk", "q_density": 0.5, "kv_density": 0.6}
GROUPED = {
    "tiles in the last layers": WHOLE.replace(
        groups=[{"layers": "2:", "policy": TOPK, "sparse": dataclasses.asdict(TILES.sparse)}]
    ),
    "none in the first": TILES.replace(groups=[{"layers": ":1", "policy": {"name": "dense"}}]),
    "another forecast": WHOLE.replace(
        groups=[{"layers": [0, 2], "forecast": {"name": "taylor", "layer_order": 3}}]
    ),
    "carried in one": TILES.replace(
        interval=1, in_computed=True, dense_steps=2,
        groups=[{"layers": [1], "sparse": dataclasses.asdict(CARRY.sparse)}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("about", GROUPED)
def test_groups_of_layers_keep_what_is_theirs(about):
    """Their policies, forecasts and sparse settings count, in their layers alone."""
    recipe = GROUPED[about]
    model, inputs = tiny("FluxTransformer2DModel")
    shapes = call_shapes(model, find_adapter(model).sites(model), inputs)
    foreseen, alone = (
        kept_bytes(each, shapes, "cpu") for each in (recipe, recipe.replace(groups=[]))
    )
    report, _ = kept(model, inputs, recipe)
    assert foreseen != alone and 0 < report.cache_bytes <= foreseen.device
    if about != "carried in one":  # has no step that takes the tiles which it might cache
        assert foreseen.device <= 1.5 * report.cache_bytes


def test_what_groups_keep_is_lowered_too():
    """Orders of their forecasts, and what they carry; never raised where theirs were lower."""
    recipe = CARRY.replace(
        interval=3, order=1, layer_order=2,
        groups=[
            {"layers": [0], "forecast": {"name": "taylor", "order": 2, "layer_order": 3}},
            {"layers": [1], "forecast": {"name": "reuse", "order": 0, "layer_order": 0}},
            {"layers": [2], "sparse": dataclasses.asdict(CARRY.sparse)},
        ],
    )  # fmt: skip
    *_, (lowered, last) = ladder(recipe, "cpu")
    assert {"carry=off", "order=0", "layer_order=0"} <= set(lowered)
    assert [g.forecast.layer_order for g in last.groups if g.forecast] == [0, 0]
    assert last.groups[2].sparse.carry == "off" == last.sparse.carry
    first = next(each for said, each in ladder(recipe, "cpu") if "layer_order=1" in said)
    assert [g.forecast.layer_order for g in first.groups if g.forecast] == [1, 0]


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_presets_on_a_model_without_text_keep_no_tiles(name):
    """What runs in place of their policy counts: a video would not fit with its tiles."""
    model, inputs = tiny(name)
    shapes = call_shapes(model, find_adapter(model).sites(model), inputs)
    foreseen = kept_bytes(Recipe.of("balanced"), shapes, "cpu")
    assert not shapes.has_text and foreseen.tiles == 0
    report, _ = kept(model, inputs, Recipe.of("balanced", min_steps=0, steps=[0, 1, 2, 4], of=6))
    assert report.cache_bytes == foreseen.device > 0


def test_what_is_foreseen_is_no_less_than_what_is_carried():
    """D lies beside tiles."""
    model, inputs = tiny("FluxTransformer2DModel")
    shapes = call_shapes(model, find_adapter(model).sites(model), inputs)
    report, _ = kept(model, inputs, CARRY)
    assert 0 < report.cache_bytes <= kept_bytes(CARRY, shapes, "cpu").device


def test_each_rung_of_the_ladder_keeps_less():
    """In device memory, or as much of it with less of the host's; each says what it lowered."""
    size = (torch.Size((1, 24, 4096, 128)), torch.bfloat16)
    stream = (torch.Size((1, 4096, 3072)), torch.bfloat16)
    shapes = Shapes((stream,) * 2, (size,) * 8, ((torch.Size((1, 4096, 64)), torch.bfloat16),))
    recipe = CARRY.replace(order=2, layer_order=2, interval=3, carry="extrapolate")
    rungs = list(ladder(recipe))
    assert rungs[0] == ((), recipe)
    assert [lowered[-1] for lowered, _ in rungs[1:]] == [
        "history_dtype=float8", "history_device=host", "carry=off", "layer_order=1", "order=0",
        "layer_order=0", "level=output",
    ]  # fmt: skip
    sizes = [kept_bytes(each, shapes) for _, each in rungs]
    pairs = itertools.pairwise((each.device, each.host) for each in sizes)
    assert all(b[0] <= a[0] and (b[0] < a[0] or b[1] < a[1]) for a, b in pairs)
    assert not any("host" in lowered[-1] for lowered, _ in list(ladder(recipe, "cpu"))[1:])


def test_what_would_not_help_is_not_lowered(monkeypatch):
    """No histories of tiles: nothing goes to the host, and their order stays; asked once."""
    model, inputs = tiny("WanTransformer3DModel")
    asked = []
    real = flashomni.models._accelerate.call_shapes
    monkeypatch.setattr(
        "flashomni.models._accelerate.call_shapes",
        lambda *args, **options: asked.append(1) or real(*args, **options),
    )
    recipe = Recipe.of("balanced", min_steps=0, level="layers")
    full = kept(model, inputs, recipe)[0].cache_bytes
    with flashomni.accelerate(model, recipe, memory=full // 8) as engine:
        for _ in range(2):
            generation(engine, model, inputs, 6)
        assert engine.report().cache_bytes <= full // 8 and asked == [1]
        (note,) = (note for note in engine.report().notes if "keeps about" in note)
        assert engine.recipe.forecast.order == 1 and " order=" not in note
        assert "layer_order=0" in note


def test_what_a_generation_gained_is_judged_by_the_recipe_that_ran(monkeypatch):
    """Not by the one that was asked for."""
    judged = []
    monkeypatch.setattr("flashomni.engine.gains.nothing", lambda _, recipe: judged.append(recipe))
    _, recipe = kept(*tiny("FluxTransformer2DModel"), TILES, memory="16 KiB")
    assert recipe.at_output and judged == [recipe] != [TILES]


@pytest.mark.slow
def test_what_does_not_fit_is_lowered_before_the_first_step(caplog):
    """Log and report say to what; the bytes hold; and it is what that recipe would have made."""
    model, inputs = tiny("FluxTransformer2DModel")
    before, _ = kept(model, inputs, TILES)
    for share in (0.6, 0.2, 0.01):
        limit = int(share * before.cache_bytes)
        caplog.clear()
        with (
            caplog.at_level(logging.INFO, logger="flashomni"),
            flashomni.accelerate(model, TILES, memory=limit) as engine,
        ):
            engine.step(0, 6)
            call(model, inputs)
            (line,) = (r for r in caplog.records if "keeps about" in r.getMessage())
            assert line.levelno == logging.WARNING and "as given" in line.getMessage()
            made, recipe = generation(engine, model, inputs, 6), engine.recipe
            report = engine.report()
        assert 0 < report.cache_bytes <= limit
        assert recipe != TILES and recipe.at_output == (share == 0.01)
        assert any("keeps about" in note for note in report.notes)
        with flashomni.accelerate(model, recipe) as engine:
            assert torch.equal(made, generation(engine, model, inputs, 6))


def test_generations_are_counted_on_where_a_later_one_is_lowered():
    """The first fits as it is: what goes is what is kept, not how many there were."""
    model, inputs = tiny("WanTransformer3DModel")
    small = {**inputs, "hidden_states": inputs["hidden_states"][:, :, :1]}
    with flashomni.accelerate(model, WHOLE, memory="100 KiB") as engine:
        found = []
        for each in (small, inputs):
            engine.step(0, 6)
            call(model, each)
            found.append((engine.recipe == WHOLE, engine.report().generation))
    assert found == [(True, 1), (False, 2)]


def test_what_fits_stays_as_it_is(caplog):
    """Also with what is free of its own accord."""
    model, inputs = tiny("FluxTransformer2DModel")
    for memory in ("auto", "1GiB"):
        with caplog.at_level(logging.INFO, logger="flashomni"):
            report, recipe = kept(model, inputs, TILES, memory=memory)
        assert recipe == TILES
        assert any(note.startswith("memory") for note in report.notes)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_nothing_fits():
    """The message says what the least would be."""
    model, inputs = tiny("FluxTransformer2DModel")
    with flashomni.accelerate(model, TILES, memory=10) as engine:
        engine.step(0, 6)
        with pytest.raises(ValueError, match=r"memory 10 B is less than any setting .*lossless"):
            call(model, inputs)
        assert not engine.running
    with pytest.raises(ValueError, match="memory must be 'auto'"):
        flashomni.accelerate(model, TILES, memory="a lot")
    assert flashomni.engine_of(model) is None


def test_a_model_without_an_adapter_keeps_to_it_too():
    """It learns its blocks again for another recipe, larger inputs lower it further."""
    model, inputs = build("PixArtTransformer2DModel")
    stock = output(model, inputs)
    recipe = Recipe.of("fora", interval=2, warmup=0.0, level="layers", layer_order=1)
    for memory in ("1MB", 12_000, 2_500):
        with flashomni.accelerate(model, recipe, memory=memory) as engine:
            for step in range(6):
                engine.step(step, 7)
                torch.testing.assert_close(output(model, inputs), stock, atol=0.1, rtol=0)
            report = engine.report()
        assert 0 < report.cache_bytes <= parse_bytes(memory)


def test_two_branches_take_twice_as_much():
    """Of bytes."""
    assert Bytes(1, 2, 3, 4).times(2) == Bytes(2, 4, 6, 8)
    assert Bytes(1, 2, 3, 4, on_host=True, passing=5).device == 8
    assert Bytes(1, 2, 3, 4, on_host=True, passing=5).times(2).device == 11  # one after another
    assert Bytes(1, 2, 3, 4, on_host=True).host == 7


def test_out_of_memory_says_what_to_lower(monkeypatch):
    """torch's error keeps its type and text, and gets a note with what the engine holds."""
    model, inputs = tiny("FluxTransformer2DModel")
    module, errors = find_adapter(model).sites(model)[-1].block.proj_mlp, []

    def fail(*_):
        if errors:
            raise errors.pop()

    module.register_forward_pre_hook(fail)
    monkeypatch.setattr("flashomni.engine.memory.SMALL", 0)
    with flashomni.accelerate(model, TILES) as engine:
        engine.step(0, 6)
        call(model, inputs)
        engine.step(1, 6)
        errors.append(torch.OutOfMemoryError("no memory left"))
        with pytest.raises(torch.OutOfMemoryError, match="no memory left") as raised:
            call(model, inputs)
        (note,) = raised.value.__notes__
        assert "memory='auto'" in note and "history_dtype=float8" in note and "order=0" in note
        engine.step(2, 6)
        errors.append(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError) as raised:
            call(model, inputs)
        assert not hasattr(raised.value, "__notes__")
