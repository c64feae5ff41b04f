"""Constant inputs: the contract of everything that is cached.

The same latents and the same timestep in every step make every cached quantity exact. So whatever
is cached, whole layers or tiles, in any combination, each step must equal the stock model to
rounding. Models of this file are the small ones of the adapters, and toys that do what real models
do between their blocks.
"""

import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import flashomni
from conftest import STEPS, call, run
from flashomni.engine import Recipe
from flashomni.models import Adapter, Site, _accelerate, find_adapter
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

NUM_STEPS = 8
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = make_policy("topk", q_density=0.5, kv_density=1.0)  # rows left are exact


def recipe(order):
    """Updates at steps 0, 3 and 6; Dispatch in between."""
    settings = {"interval": 3, "warmup": 0.0, "order": order, "layer_order": order}
    return Recipe.of(TILES, degrade_below=0.5, **settings)


def fill_gates(model):
    """Random values for what is initialised to zero: otherwise blocks would not matter."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.3)


def subsets(count):
    """No layer, all, single ones, every other, and random ones by seed."""
    drawn = random.Random(count)
    some = [set(drawn.sample(range(count), drawn.randint(2, count - 1))) for _ in range(3)]
    fixed = [set(), set(range(count)), set(range(0, count, 2)), set(range(1, count, 2))]
    chosen = [*fixed, *({i} for i in range(count)), *some]
    return [s for i, s in enumerate(chosen) if s not in chosen[:i]]


def worst_error(engine, model, inputs, stock, steps=NUM_STEPS, disturb=None):
    """Largest error over the steps, relative to what :data:`CLOSE` allows."""
    worst = 0.0
    for step in range(steps):
        engine.step(step, steps + 1)  # none of them is the last, which is computed
        error = (call(model, inputs) - stock).abs() / (CLOSE["atol"] + CLOSE["rtol"] * stock.abs())
        worst = max(worst, error.max().item())
        if disturb is not None and step == 0:
            disturb(engine)
    return worst


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("order", [0, 1])
def test_any_set_of_cached_layers_is_exact(tiny, cache_whole, order):
    """Whole layers and tiles mixed: every step equals the stock model."""
    model, inputs = tiny
    fill_gates(model)
    stock = call(model, inputs)
    for layers in subsets(len(find_adapter(model).sites(model))):
        cache_whole(layers)
        with flashomni.accelerate(model, recipe(order)) as engine:
            assert worst_error(engine, model, inputs, stock) < 1, layers
            kinds = set(itertools.chain(*(step["layer_kinds"] for step in engine.report().steps)))
        assert ("bypass" in kinds) == bool(layers)


def branch_of(engine):
    (branch,) = engine._runtime.last.branches.values()
    return branch


def shift_span(engine):
    for history in branch_of(engine).groups[0].spans._current[0].histories:
        history.terms()[0][..., 0].add_(1e-3)  # a norm would hide a shift of all


def shift_history(engine):
    layer = next(layer for layer in branch_of(engine).layers if layer.history is not None)
    layer.history.terms()[0][:, -200:].add_(1e-3)


def shift_bias_terms(engine):
    layer = next(layer for layer in branch_of(engine).layers if layer.bias_terms is not None)
    layer.bias_terms.get()[0].add_(1e-3)


class Called(nn.Linear):
    """A Linear that is called, never read: then O is forecast instead of its projection."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("disturb", "layers"),
    [(shift_span, {0, 1}), (shift_bias_terms, set()), (shift_history, set())],
    ids=["span", "bias terms", "history of O"],
)
def test_the_contract_sees_one_wrong_value(tiny, cache_whole, disturb, layers):
    """The guard of the test above: one kind of cached value off by 1e-3, and it fails."""
    model, inputs = tiny
    fill_gates(model)
    if disturb is shift_history:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and (name == "proj_out" or name == "0"):
                    called = Called(child.in_features, child.out_features, child.bias is not None)
                    called.load_state_dict(child.state_dict())
                    setattr(module, name, called)
    stock = call(model, inputs)
    cache_whole(layers)
    with flashomni.accelerate(model, recipe(0)) as engine:
        assert worst_error(engine, model, inputs, stock, steps=3) < 1
    with flashomni.accelerate(model, recipe(0)) as engine:
        assert worst_error(engine, model, inputs, stock, steps=3, disturb=disturb) > 2


# Toys: what models do around their blocks.


class ToyBlock(nn.Module):
    """``x + tanh(W x + b)``; ``shape`` says what it returns."""

    def __init__(self, shape="tensor"):
        super().__init__()
        self.linear, self.shape = nn.Linear(8, 8), shape

    def forward(self, x, skip=None):
        if skip is not None:
            x = x + 0.5 * skip
        x = x + torch.tanh(self.linear(x))
        return (None, x) if self.shape == "pair" else x


class Toy(nn.Module):
    """Six blocks, and ``between`` them something that the model does."""

    def __init__(self, between="nothing", shape="tensor"):
        super().__init__()
        self.blocks = nn.ModuleList(ToyBlock(shape) for _ in range(6))
        self.between = between

    def forward(self, hidden_states, return_dict=False):
        x, kept = hidden_states, []
        for index, block in enumerate(self.blocks):
            skip = kept.pop() if self.between == "skip" and index >= 3 else None
            out = block(x, skip)
            x = out[1] if isinstance(out, tuple) else out
            if self.between == "in place":
                x[:, 4:] += 1
            elif self.between == "new tensor":
                x = x + 1
            if self.between == "list" or (self.between == "skip" and index < 3):
                kept.append(x)
        return (torch.cat(kept, 1) if self.between == "list" else x,)


def run_toy(run, block, x, skip=None):
    run.begin(x.shape[1])
    if skip is not None:
        x = x + 0.5 * skip
    x = x + torch.tanh(block.linear(x))
    return (None, x) if block.shape == "pair" else x


class ToyAdapter(Adapter):
    def __init__(self, chain):
        self.chain = chain

    def sites(self, model):
        pair = model.blocks[0].shape == "pair"
        returns = (None, "x") if pair else "x"
        return [
            Site(f"blocks.{i}", block, run_toy, ("x",), returns, self.chain)
            for i, block in enumerate(model.blocks)
        ]


@pytest.fixture
def toy(monkeypatch):
    """A toy model whose adapter says whether its blocks may be chained, and its inputs."""

    def make(between="nothing", shape="tensor", chain=True):
        torch.manual_seed(0)
        monkeypatch.setattr(_accelerate, "find_adapter", lambda model: ToyAdapter(chain))
        return Toy(between, shape).eval(), {"hidden_states": torch.randn(2, 12, 8)}

    return make


def toy_error(model, inputs, layers, cache_whole, order=0):
    model, stock = copy.deepcopy(model), call(copy.deepcopy(model), inputs)
    cache_whole(layers)
    with flashomni.accelerate(model, recipe(order)) as engine:
        return worst_error(engine, model, inputs, stock)


TOY_SUBSETS = [set(range(6)), {0, 1}, {1, 2, 3}, {0, 2, 4}, {3, 4, 5}, {2}]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("between", ["skip", "list"])
def test_who_reads_between_blocks_gets_what_stock_gives(toy, cache_whole, between, order):
    """Skip connections and kept lists: right where the site says that it may not be chained."""
    model, inputs = toy(between, chain=False)
    for layers in TOY_SUBSETS:
        assert toy_error(model, inputs, layers, cache_whole, order) < 1, layers


@pytest.mark.parametrize("between", ["skip", "list"])
def test_chained_blocks_would_be_wrong_there(toy, cache_whole, between):
    """Why ``chain`` exists: the end of a run is handed to who keeps an intermediate output."""
    model, inputs = toy(between, chain=True)
    assert toy_error(model, inputs, {0, 1, 2}, cache_whole) > 100


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("between", ["in place", "new tensor", "nothing"])
def test_what_a_model_adds_between_blocks_is_added_once(toy, cache_whole, between, chain, order):
    """A ControlNet's addition, in place or not, is not recorded with the block in front of it."""
    model, inputs = toy(between, chain=chain)
    for layers in TOY_SUBSETS:
        assert toy_error(model, inputs, layers, cache_whole, order) < 1, layers


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("between", ["in place", "new tensor", "nothing"])
def test_additions_between_blocks_under_inference_mode(toy, cache_whole, between, chain, order):
    """Inference tensors have no version: what could be written to is handed on as a copy."""
    model, inputs = toy(between, chain=chain)
    with torch.inference_mode():
        inputs = {"hidden_states": inputs["hidden_states"].clone()}
        for layers in TOY_SUBSETS:
            assert toy_error(model, inputs, layers, cache_whole, order) < 1, layers


def test_inference_mode_gives_what_no_grad_gives(tiny):
    """Bit for bit, whole layers cached: copies lie as what they are copies of."""
    model, inputs = tiny
    plain, _ = run(model, inputs, "fora:interval=3,warmup=0,level=layers")
    with torch.inference_mode():
        inside, report = run(model, inputs, "fora:interval=3,warmup=0,level=layers")
    assert torch.equal(plain, inside) and "bypass" in report.steps[1]["layer_kinds"]


@pytest.mark.parametrize("shape", ["tensor", "pair"])
@pytest.mark.parametrize("between", ["nothing", "in place", "skip"])
def test_blocks_return_what_they_return_in_stock(toy, cache_whole, shape, between):
    """A bare tensor, or a tuple with None: also where the block is cached."""
    model, inputs = toy(between, shape, chain=False)
    for layers in TOY_SUBSETS:
        assert toy_error(model, inputs, layers, cache_whole) < 1, layers


class Negate(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, skip=None):
        return -x


def run_negate(run, block, x, skip=None):
    run.begin(x.shape[1])
    return -x


def test_differences_that_overflow_fp16_are_finite(toy, cache_whole, monkeypatch):
    """Two values in range, 80000 apart: kept in fp32, so Dispatch steps are as finite as stock."""
    model, _ = toy()
    model.blocks = nn.ModuleList([Negate()])
    site = Site("blocks.0", model.blocks[0], run_negate, ("x",), "x")
    monkeypatch.setattr(ToyAdapter, "sites", lambda self, model: [site])
    inputs = {"hidden_states": torch.full((1, 4, 8), 4e4, dtype=torch.float16)}
    cache_whole({0})
    with flashomni.accelerate(model, recipe(0)) as engine:
        for step in range(3):
            engine.step(step, 5)
            torch.testing.assert_close(call(model, inputs), -inputs["hidden_states"])
        assert "bypass" in engine.report().steps[1]["layer_kinds"]


class Jumps(nn.Module):
    """A block whose attention gives ``value`` everywhere."""

    def __init__(self):
        super().__init__()
        self.to_out, self.value = nn.Linear(32, 8), 0.0
        self.to_out.weight.mul_(1e-5)

    def forward(self, x, skip=None):
        o = torch.full((*x.shape[:2], 32), self.value, dtype=x.dtype)
        return x + self.to_out(o)


def run_jumps(run, block, x, skip=None):
    run.begin(x.shape[1])
    q = x.new_zeros(*x.shape[:2], 2, 16)
    o = run.attend(q, q, torch.full_like(q, block.value), block.to_out)
    return x + run.project_o(o, block.to_out, row_offset=0)


def test_differences_of_tiles_that_overflow_fp16(toy, cache_whole, monkeypatch):
    """Two steps in a row whose O lie 80000 apart: what is forecast of them is not infinite."""
    model, _ = toy()
    model.blocks = nn.ModuleList([Jumps()])
    site = Site("blocks.0", model.blocks[0], run_jumps, ("x",), "x")
    monkeypatch.setattr(ToyAdapter, "sites", lambda self, model: [site])
    policy = make_policy("topk", q_density=0.25, kv_density=1.0)
    chosen = Recipe.of(policy, schedule="steps", steps=(0, 1), of=4, order=1)
    cache_whole(set())
    x = torch.zeros(1, 1030, 8)
    outputs = []
    for dtype in (torch.float16, torch.float32):
        model.to(dtype)
        with flashomni.accelerate(model, chosen) as engine:
            for step, value in enumerate((4e4, -4e4, -4e4)):
                model.blocks[0].value = value
                engine.step(step, 4)
                out = call(model, {"hidden_states": x.to(dtype)})
            kinds = [step["kind"] for step in engine.report().steps]
        assert kinds[1:] == ["update", "dispatch"]
        outputs.append(out.float())
    got, exact = outputs
    assert len(exact.round(decimals=2).unique(dim=1).flatten()) == 16  # tiles computed and forecast
    torch.testing.assert_close(got, exact, rtol=5e-3, atol=5e-3)


def test_the_contract_sees_wrong_rows(tiny, no_grad):
    """Symbols that say the opposite of what was cached: constant inputs do not hide it."""
    model, inputs = tiny
    recipe = "topk:q_density=.5,kv_density=1,interval=4,warmup=0,order=0,block_m=32,block_n=32"
    with flashomni.accelerate(model, recipe) as engine:
        engine.step(0, STEPS)
        stock = call(model, inputs)
        engine.step(1, STEPS)
        torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
        layer = engine._runtime.last.branches["call"].layers[0]
        grid = layer.symbols.grid
        flipped = (
            layer.symbols.q_bits
            ^ grid.all_kv_bits(torch.device("cpu"))[: layer.symbols.q_bits.shape[-1]]
        )
        layer.symbols = replace(layer.symbols, q_bits=flipped)
        engine.step(2, STEPS)
        wrong = call(model, inputs)
    assert not torch.allclose(wrong, stock, atol=2e-5, rtol=1e-4)
