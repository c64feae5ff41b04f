"""The contract of carry: constant inputs, one refresh, then any change of S_c.

With the same latents and the same timestep in every step D is exact, wherever it is added. So every
step must equal the stock model to rounding: with tiles cached (other ones from Update to Update) at
any forecast order, with layers cached whole, in any mixture, and with D in front of the projection
or behind it. Of nine designs of carry only two do.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from test_constant import CLOSE, fill_gates
from test_models import lowered, wrap_outputs
from tiny_models import build, output

import flashomni
from conftest import call
from flashomni.engine import Recipe
from flashomni.engine.grids import Grids
from flashomni.engine.layer import LayerRun
from flashomni.engine.schedules import StepKind
from flashomni.engine.state.storage import Storage
from flashomni.engine.step_plan import StepPlan
from flashomni.policies import Policy
from flashomni.symbols import Symbols

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 6


@dataclass(frozen=True)
class Turning(Policy):
    """Other tiles at every Update, other columns in every layer; half of both."""

    name = "turning"

    def __call__(self, site):
        grid, batch, num_heads = site.grid, site.q.shape[0], site.q.shape[2]
        drawn = torch.Generator().manual_seed(1000 * site.layer + site.step)
        q_mask = torch.rand(batch, num_heads, grid.num_q_blocks, generator=drawn) < 0.5
        drawn.manual_seed(site.layer)
        shape = (batch, num_heads, grid.num_q_blocks, grid.num_kv_blocks)
        kv_mask = torch.rand(shape, generator=drawn) < 0.5
        return Symbols.pack(q_mask.to(site.q.device), kv_mask.to(site.q.device), grid)


def recipe(order=1, **settings):
    """A full step, which is the refresh, then Updates and Dispatch steps in turn."""
    sparse = {"choose_at": (0,), "in_computed": True, "refresh": 0, "carry": "hold"}
    settings = {**sparse, "order": order, "layer_order": min(order, 1), **settings}
    settings |= {"block_m": 32, "block_n": 32, "degrade_below": 0.5}
    return Recipe.of(Turning(), interval=2, warmup=0.15, **settings)


def error_of(model, inputs, stock, recipe, call=call):
    """Largest error over the steps, relative to what rounding allows; and the report."""
    worst, limit = 0.0, CLOSE["atol"] + CLOSE["rtol"] * stock.abs()
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS + 1)  # none of them is the last
            worst = max(worst, ((call(model, inputs) - stock).abs() / limit).max().item())
        return worst, engine.report()


@pytest.fixture
def constant(tiny):
    """``(model, inputs, what stock gives)``, every block of which matters."""
    model, inputs = copy.deepcopy(tiny[0]), tiny[1]
    fill_gates(model)
    return model, inputs, call(model, inputs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("order, summaries", [(0, 0), (1, 4), (2, 0)])
def test_carry_is_exact_whatever_is_cached(constant, cache_whole, order, summaries):
    """Tiles that change at every Update, and a layer that is cached whole beside them."""
    cache_whole({1})
    worst, report = error_of(*constant, recipe(order, summaries=summaries))
    kinds = [step["kind"] for step in report.steps]
    assert worst < 1
    assert kinds == ["full", "update", "dispatch", "update", "dispatch", "full"]
    assert all(step["kv_density"][0] < 0.9 for step in report.steps[1:])
    assert error_of(*constant, recipe(order, carry="off"))[0] > 10


def test_carry_in_front_of_the_projection(constant, cache_whole):
    """Where the projection has to be called, D is added to O and histories go without."""
    model, *rest = constant
    wrap_outputs(model)
    for layers in (set(), {0}):
        cache_whole(layers)
        assert error_of(model, *rest, recipe(1, summaries=4))[0] < 1


# Designs that are wrong, each in one place: the contract above must tell them from the right one.


def count_twice(monkeypatch):
    """Histories of the corrected O, and D of all heads: cached heads have it twice."""
    push, known = LayerRun._push_history, {}

    def wrong(run, o, row_offset):
        if run._difference is not None:
            known[run.index] = run._difference[:, row_offset : row_offset + o.shape[1]]
        return push(run, o + known[run.index], row_offset)

    monkeypatch.setattr(LayerRun, "_push_history", wrong)


def forget_in_dispatch(monkeypatch):
    """D is added where a layer is computed, not where it dispatches."""
    carried = LayerRun._carried

    def wrong(run, value, row_offset, weights=None):
        is_dispatch = run.kind is StepKind.DISPATCH
        return value if is_dispatch else carried(run, value, row_offset, weights)

    monkeypatch.setattr(LayerRun, "_carried", wrong)


def project_live_heads(monkeypatch):
    """D of the heads that are computed when it is made: wrong as soon as others are."""
    carried = LayerRun._carried

    def wrong(run, value, row_offset, weights=None):
        if run._difference is not None:
            run._difference = run._difference.clone()
            run._difference[:, :, ::2] = 0
        return carried(run, value, row_offset, weights)

    monkeypatch.setattr(LayerRun, "_carried", wrong)


@pytest.mark.covering(1)
@pytest.mark.parametrize("design", [count_twice, forget_in_dispatch, project_live_heads])
def test_the_contract_sees_a_wrong_design(constant, cache_whole, monkeypatch, design):
    cache_whole(set())
    design(monkeypatch)
    assert error_of(*constant, recipe())[0] > 10


@pytest.mark.parametrize(
    "name", ["AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "StableAudioDiTModel"]
)
def test_carry_of_models_without_an_adapter(name):
    """The generic tiers hand O back to the block, so D is in it."""
    model, inputs = build(name)
    fill_gates(model)
    given = (model, inputs, output(model, inputs))
    assert error_of(*given, recipe(1, summaries=4), output)[0] < 1
    assert error_of(*given, recipe(1, summaries=4, carry="off"), output)[0] > 10


def test_carried_differences_go_on_as_they_changed():
    """Of the last change of D a share a step; terms of fp16 are halved as they are kept."""
    recipe = Recipe.of("topk", carry="extrapolate", extrapolation=0.4, in_computed=True)
    plan = StepPlan(
        kind=StepKind.DISPATCH, step=7, num_steps=10, branch="cond", records=False, probes=False,
        optimistic=False, progress=torch.tensor(0.8), recipe=recipe, storage=Storage(),
        backend=None, device=torch.device("cpu"), num_layers=1, grids=Grids().on,
    )  # fmt: skip
    torch.testing.assert_close(plan.carried((2, 5)), torch.tensor([1.0, 0.8]))
    torch.testing.assert_close(plan.carried((2, 5), halved=True), torch.tensor([1.0, 1.6]))
    assert plan.carried((5,)).tolist() == [1.0]


def test_carry_where_the_output_is_cached(constant):
    """Level ``output``: Dispatch steps leave the model out, the others are sparse."""
    worst, report = error_of(*constant, recipe(1, summaries=4, level="output"))
    assert worst < 1
    assert max(report.steps[1]["kv_density"]) < 0.9 and report.steps[2]["kv_density"][0] == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_carry_in_bfloat16_is_as_exact_as_the_stock_model(tiny, device):
    """Error against fp32 at most twice that of the stock model in bf16."""
    model, inputs = tiny
    exact = call(model, inputs)
    low = copy.deepcopy(model).to(device, torch.bfloat16)
    given = {
        key: lowered(value).to(device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    limit = 2 * (call(low, given).float().cpu() - exact).abs().max()
    with flashomni.accelerate(low, recipe(1, summaries=4)) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS + 1)
            assert (call(low, given).float().cpu() - exact).abs().max() <= limit, step
