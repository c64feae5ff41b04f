"""Token orders: permutations, and models whose blocks get their tokens in one of them."""

import itertools

import pytest
import torch
from recorder import TapeRecorder

import flashomni
from conftest import ONES, SPARSE, STEPS, call, generation, residue, run
from flashomni.engine import Recipe
from flashomni.engine.schedules.teacache import TeaCache
from flashomni.engine.token_order import TokenOrder
from flashomni.models import Blocks, adapters
from flashomni.policies import make_policy
from flashomni.symbols import Grid
from flashomni.symbols.order import coordinates, permutation

ORDERS = ("tile", "hilbert")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (1, 1, 7), (5, 1, 1), (1, 64, 64), (1, 18, 19), (1, 3, 50), (17, 16, 16),
          (5, 9, 7), (33, 2, 3), (4, 30, 52)]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_every_shape_has_an_order(order):
    """A permutation of any box, those that no tile and no power of two divides too."""
    for shape in [*SHAPES, *itertools.product(range(1, 6), repeat=3)]:
        found = permutation(shape, order)
        assert torch.equal(found.sort().values, torch.arange(len(found))), shape


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hilbert_curve_goes_from_neighbour_to_neighbour(shape):
    """Two axes by one step at most, and that seldom: odd sides have no other curve."""
    steps = coordinates(shape, "hilbert").diff(dim=1).abs()
    assert (steps <= 1).all() and (steps.sum(0) <= 2).all()
    assert (steps.sum(0) > 1).sum() <= 0.03 * steps.shape[1]


def spread(places, block=128):
    """Mean squared distance of tokens from the middle of their block."""
    whole = places.shape[1] // block * block
    blocks = places[:, :whole].double().unflatten(1, (-1, block))
    return float((blocks - blocks.mean(2, keepdim=True)).square().sum(0).mean())


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 63, 61), (17, 16, 16), (33, 30, 34)])
def test_compact_orders_are_compact(shape):
    raster, tile, hilbert = (spread(coordinates(shape, o)) for o in ("raster", *ORDERS))
    assert tile < 0.8 * raster and hilbert < 0.4 * raster and hilbert <= tile


def test_tiles_are_what_they_are_called():
    """Whole tiles of 8 x 16 tokens one after the other; of 4 x 4 in eight frames."""
    blocks = coordinates((1, 24, 48), "tile").unflatten(1, (-1, 128))
    assert torch.equal(blocks.amax(2) - blocks.amin(2), torch.tensor([[0], [7], [15]]).expand(3, 9))
    video = coordinates((8, 12, 12), "tile").unflatten(1, (-1, 128))
    assert torch.equal(video.amax(2) - video.amin(2), torch.tensor([[7], [3], [3]]).expand(3, 9))


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order must be one of raster, tile, hilbert, got 'zig'"):
        permutation((1, 2, 3), "zig")
    with pytest.raises(ValueError, match="token_order must be one of raster, tile, hilbert"):
        Recipe.of("lossless", token_order="zig")


def test_extents_hold_every_token():
    """Of blocks with text, references, nothing else, and a ragged end."""
    shape, text = (3, 10, 10), 21
    grid = Grid(
        300 + text + 40, 300 + text + 40, (0, text), 16, 16, shape=shape, order="hilbert",
        spans=(("reference", 300 + text, 300 + text + 40),),
    )  # fmt: skip
    first, last = grid.extents(16, CPU)
    place = coordinates(shape, "hilbert")
    block = (torch.arange(300) + text) // 16
    for number in range(grid.num_q_blocks):
        mine = place[:, block == number]
        if mine.shape[1]:
            assert torch.equal(first[:, number], mine.amin(1))
            assert torch.equal(last[:, number], mine.amax(1))
        else:
            assert (last[:, number] < first[:, number]).all()
    with pytest.raises(ValueError, match="coordinates need a grid with a shape"):
        Grid(300, 300).coordinates(CPU)


def test_there_and_back():
    """Exact, each picture by itself, and what lies around the vision tokens stays."""
    shapes, count = ((1, 6, 7), (1, 4, 5)), 6 * 7 + 4 * 5
    tokens = TokenOrder("hilbert", shapes, 20, CPU)
    x = torch.randn(2, count, 3)
    there = tokens.enter(x)
    assert torch.equal(tokens.leave(there), x) and not torch.equal(there, x)
    assert torch.equal(there[:, :42], x[:, permutation(shapes[0], "hilbert")])
    assert torch.equal(there[:, 42:], x[:, 42:][:, permutation(shapes[1], "hilbert")])
    table = torch.randn(count + 9, 4)
    (moved,) = tokens.tables(5, table)
    assert torch.equal(moved[5 : 5 + count], tokens.enter(table[5 : 5 + count], dim=0))
    assert torch.equal(moved[:5], table[:5]) and torch.equal(moved[-4:], table[-4:])
    with pytest.raises(ValueError, match="x must have 62 vision tokens from 3 on along dim 0"):
        tokens.tables(3, table[:60])
    unknown = TokenOrder("hilbert", shapes[:1], 20, CPU)  # the picture's shape is not known
    assert torch.equal(unknown.enter(x)[:, 42:], x[:, 42:]) and unknown != tokens


# Models.


def stock_of(model, inputs, steps=4):
    """A generation of the stock model whose latents drift."""
    outputs, latents = [], inputs["hidden_states"]
    for _ in range(steps):
        outputs.append(call(model, {**inputs, "hidden_states": latents}))
        latents = latents - 0.05 * outputs[-1] if latents.shape == outputs[-1].shape else latents
    return torch.stack(outputs)


def check_exact(model, inputs, recipe, steps=4):
    """Every step equals the stock model; removed, the bits are its own."""
    stock = call(model, inputs)
    clean = residue(model)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(steps):
            engine.step(step, steps)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
    assert torch.equal(call(model, inputs), stock) and residue(model) == clean


@pytest.mark.usefixtures("no_grad")
@pytest.mark.covering(1)
@pytest.mark.parametrize("order", ORDERS)
def test_order_alone_changes_nothing(tiny, order):
    """Of every adapter, at density 1; in two generations of two sizes; and removed."""
    model, inputs = tiny
    clean = residue(model)
    stock, before = stock_of(model, inputs), call(model, inputs)
    other = smaller(model, inputs)
    with flashomni.accelerate(model, ONES.replace(token_order=order)) as engine:
        for some, expected in ((inputs, stock), (other, None), (inputs, stock)):
            got = generation(engine, model, some, steps=4)
            expected = plain(engine, model, some) if expected is None else expected
            torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(call(model, inputs), before) and residue(model) == clean


def plain(engine, model, inputs):
    """The stock model, by a copy: the engine stays on this one."""
    import copy

    return stock_of(copy.deepcopy(model), inputs)


def smaller(model, inputs):
    """The same call for a picture, or a video, of fewer rows."""
    x = inputs["hidden_states"]
    if x.ndim == 5:
        return {**inputs, "hidden_states": x[:, :, :, :-4]}
    if x.ndim == 4:
        return {**inputs, "hidden_states": x[:, :, :-4]}
    changed = {**inputs, "hidden_states": x[:, : 9 * 19]}
    if "num_frames" in inputs:
        return {**inputs, "hidden_states": x[:, : 5 * 6 * 7], "height": 6}
    if "img_ids" in inputs:
        changed["img_ids"] = inputs["img_ids"][: 9 * 19]
    else:
        changed["img_shapes"] = [[(1, 9, 19)]] * 2
    return changed


@pytest.mark.usefixtures("no_grad")
def test_the_policy_sees_the_tokens_in_order(tiny, monkeypatch):
    """Queries and keys are the raster ones, reordered; the grid says so."""
    model, inputs = tiny
    policy = type(make_policy("window"))
    sites, choose = [], policy.__call__
    monkeypatch.setattr(policy, "__call__", lambda s, site: sites.append(site) or choose(s, site))
    recipe = Recipe.of(make_policy("window"), warmup=0.0, interval=2)
    for order in ("raster", "hilbert"):
        with flashomni.accelerate(model, recipe, token_order=order) as engine:
            engine.step(0, 4)
            call(model, inputs)
    half = len(sites) // 2
    for raster, moved in zip(sites[:half], sites[half:], strict=True):
        grid = moved.grid
        assert (raster.grid.order, grid.order) == ("raster", "hilbert")
        start, stop = grid.vision
        index = torch.arange(grid.seqlen_q)
        index[start:stop] = permutation(grid.shape, "hilbert") + start
        torch.testing.assert_close(moved.q, raster.q[:, index], **CLOSE)
        torch.testing.assert_close(moved.k[:, start:stop], raster.k[:, index[start:stop]], **CLOSE)


@pytest.mark.usefixtures("no_grad")
def test_whole_layers_are_cached_alike(tiny):
    """Forecasts of tokens do not mind their order; neither does what skips nothing."""
    model, inputs = tiny
    recipe = Recipe.of("taylorseer", interval=3, warmup=0.1, level="layers")
    raster, _ = run(model, inputs, recipe)
    moved, report = run(model, inputs, recipe.replace(token_order="hilbert"))
    torch.testing.assert_close(moved, raster, atol=1e-4, rtol=1e-3)
    assert any("bypass" in step["layer_kinds"] for step in report.steps)


@pytest.mark.usefixtures("no_grad")
def test_sparse_steps_skip_other_pairs(tiny):
    """The same density, another choice: the order is not lost on the way."""
    model, inputs = tiny
    raster, _ = run(model, inputs, SPARSE.replace(block_m=32, block_n=32))
    moved, _ = run(model, inputs, SPARSE.replace(block_m=32, block_n=32, token_order="hilbert"))
    assert torch.isfinite(moved).all() and not torch.allclose(moved, raster, atol=1e-4)


def tiny_of(name):
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    return model.eval(), dict(inputs)


def ids(height, width, kind=0.0):
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    return torch.cartesian_prod(torch.tensor([kind]), rows, columns)


@pytest.mark.usefixtures("no_grad")
def test_reference_images_are_ordered_by_themselves():
    """FLUX Kontext with two pictures: three spans, each compact, none mixed."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    inputs["img_ids"] = torch.cat([ids(11, 13), ids(4, 7, 1.0), ids(5, 6, 2.0)])
    inputs["hidden_states"] = torch.randn(2, 143 + 28 + 30, 16)
    check_exact(model, inputs, ONES.replace(token_order="hilbert"))
    inputs["img_ids"] = torch.cat([ids(11, 13), ids(4, 7, 1.0).flip(0), ids(5, 6, 2.0)])
    check_exact(model, inputs, ONES.replace(token_order="tile"))  # one is in no known order


@pytest.mark.usefixtures("no_grad")
def test_reference_images_of_qwen_image_edit():
    """Modulated apart, token by token."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    known = adapters()["QwenImageTransformer2DModel"]
    model = QwenImageTransformer2DModel(**known.sizes["tiny"], zero_cond_t=True).eval()
    inputs = dict(known.tiny()[1])
    inputs["img_shapes"] = [[(1, 11, 13), (1, 4, 7), (1, 3, 5)]] * 2
    inputs["hidden_states"] = torch.randn(2, 143 + 28 + 15, 16)
    check_exact(model, inputs, ONES.replace(token_order="hilbert"))


@pytest.mark.usefixtures("no_grad")
def test_timesteps_of_single_tokens(monkeypatch):
    """Wan 2.2 TI2V: the first frame has timestep 0; TeaCache sees the same as in raster order."""
    model, inputs = tiny_of("WanTransformer3DModel")
    timestep = torch.full((2, 5, 63), 500.0)
    timestep[:, 0] = 0.0
    inputs["timestep"] = timestep.flatten(1)
    check_exact(model, inputs, ONES.replace(token_order="hilbert"))
    seen, watch = [], TeaCache.watch
    monkeypatch.setattr(
        TeaCache,
        "watch",
        lambda s, i, signals: seen.append(signals.modulated()) or watch(s, i, signals),
    )
    for order in ("raster", "hilbert"):
        with flashomni.accelerate(model, "teacache", token_order=order) as engine:
            engine.step(0, 4)
            call(model, inputs)
    index = permutation((5, 9, 7), "hilbert")
    torch.testing.assert_close(seen[1], seen[0][:, index], **CLOSE)


def controlled(name):
    """A model with ControlNet residuals for each token, and one for all."""
    model, inputs = tiny_of(name)
    count, width = inputs["hidden_states"].shape[1], 48
    inputs["controlnet_block_samples"] = [torch.randn(2, count, width) for _ in range(2)]
    if name.startswith("Flux"):
        inputs["controlnet_single_block_samples"] = [torch.randn(2, count, width)]
    return model, inputs


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_residuals_of_a_controlnet_follow(name):
    """What the model adds between blocks is in raster order; no bit of it stays behind."""
    model, inputs = controlled(name)
    check_exact(model, inputs, ONES.replace(token_order="hilbert"))
    inputs["controlnet_block_samples"] = [torch.randn(2, 1, 48)]  # one for all
    check_exact(model, inputs, ONES.replace(token_order="tile"))
    inputs["controlnet_block_samples"] = [torch.randn(2, 5, 48)]
    with flashomni.accelerate(model, ONES, token_order="tile") as engine:
        engine.step(0, 4)
        with pytest.raises(
            NotImplementedError, match=r"'tile': controlnet_block_samples must hold \[B, 342, K\]"
        ):
            call(model, inputs)


@pytest.mark.usefixtures("no_grad")
def test_an_exit_that_was_replaced_is_refused():
    """A LoRA of the output norm, say: tokens would stay in another order behind it."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    with flashomni.accelerate(model, ONES, token_order="tile") as engine:
        engine.step(0, 4)
        call(model, inputs)
        model.norm_out, kept = torch.nn.Sequential(model.norm_out), model.norm_out
        engine.step(1, 4)
        with pytest.raises(NotImplementedError, match="norm_out is another module than when"):
            call(model, inputs)
        model.norm_out = kept


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_in_graphs(name):
    """Counted, recorded, replayed, each generation the same bits as without graphs."""
    model, inputs = controlled(name) if name.startswith("Flux") else tiny_of(name)
    recipe = Recipe.of("taylorseer:interval=3,warmup=0.2,level=layers", token_order="hilbert")
    expected, _ = run(model, inputs, recipe, backend="reference")
    with flashomni.accelerate(model, recipe, graphs=True, backend="reference") as engine:
        engine._runtime.graphs._recorder_for = lambda device: TapeRecorder()
        for _ in range(4):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert engine._runtime.graphs.replays >= STEPS
    assert residue(model) == []


@pytest.mark.usefixtures("no_grad")
def test_what_cannot_be_reordered_is_refused_by_name():
    """A model without an adapter, at once; one that does not tell its shape, at its first call."""
    model, inputs = tiny_of("FluxTransformer2DModel")
    with pytest.raises(NotImplementedError, match=r"token_order 'hilbert' needs an adapter"):
        flashomni.accelerate(model, ONES, blocks=Blocks(), token_order="hilbert")
    stock = call(model, inputs)
    inputs["img_ids"] = inputs["img_ids"][torch.randperm(342)]
    with flashomni.accelerate(model, ONES, token_order="tile") as engine:
        engine.step(0, 4)
        with pytest.raises(NotImplementedError, match=r"token_order 'tile' needs .* img_ids does"):
            call(model, inputs)
        inputs["img_ids"] = ids(18, 19)
        engine.step(0, 4)
        torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
