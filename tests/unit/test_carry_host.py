"""D in host memory: the same bits whenever copies happen, and as much on the device as was said.

A lane of the CPU stands in for that of a card, with the freedom that a stream has: what is sent is
read, and what is brought is written, only when somebody waits for it. So whoever writes over
something that is under way, or reads it before it is there, gets other bits.
"""

import copy
import weakref
from collections import deque
from dataclasses import replace

import pytest
import torch
from test_models import wrap_outputs

import flashomni
from conftest import call, generation, make_tiny
from flashomni.engine import Recipe, block, layer_carry
from flashomni.engine.memory import kept_bytes
from flashomni.engine.state import storage
from flashomni.engine.state.room import Keeping
from flashomni.models import find_adapter
from flashomni.models._memory import call_shapes
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 8
RECIPE = Recipe.of(
    make_policy("topk", q_density=1.0, kv_density=0.5), interval=1, warmup=0.0, in_computed=True,
    block_m=32, block_n=32, choose_at=(1,), dense_steps=2, carry="extrapolate", refresh=3,
    degrade_below=1.0, layer_order=0,
)  # fmt: skip


class LateLane(storage.Lane):
    """Copies in their order, as late as a stream may make them."""

    def __init__(self, device):
        self.device, self._leaving, self._under_way = device, deque(), deque()

    def room(self, like):
        return torch.full_like(like, torch.nan)

    def bring(self, host):
        value, event = super().bring(host)
        return value.fill_(torch.nan), event

    def wait(self, event):
        while event in [each for each, *_ in self._under_way]:
            _, to, source = self._under_way.popleft()
            to.copy_(source)

    def _copy(self, to, source):
        self._under_way.append((event := object(), to, source))
        return event


@pytest.fixture
def late(monkeypatch):
    """Recipes that keep D on the host do so here; what is done in parts has ragged ones."""
    on = Keeping.on

    def with_lane(keeping, device, on_host=None):
        wanted = keeping._settings.history_device == "host" if on_host is None else on_host
        keeping._lane = keeping._lane or LateLane(device)
        made = on(keeping, device, False)
        return replace(made, lane=keeping._lane) if wanted else made

    monkeypatch.setattr(Keeping, "on", with_lane)
    monkeypatch.setattr(storage, "PART", 5000)


def outputs(model, inputs, recipe):
    with flashomni.accelerate(model, recipe) as engine:
        return generation(engine, model, inputs, STEPS)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"])
@pytest.mark.parametrize("carry", ["extrapolate", "hold"])
@pytest.mark.parametrize("where", ["behind the projection", "in front of it"])
def test_the_same_bits_whenever_copies_happen(late, name, carry, where):
    """As on the device, to the last bit; also with items in a batch, whose rows lie apart."""
    model, inputs = make_tiny(name)
    if where == "in front of it":
        model = copy.deepcopy(model)
        wrap_outputs(model)
    recipe = RECIPE.replace(carry=carry)
    expected = outputs(model, inputs, recipe)
    got = outputs(model, inputs, recipe.replace(history_device="host"))
    assert torch.equal(got, expected)
    assert not torch.equal(got, outputs(model, inputs, recipe.replace(carry="off")))


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["extrapolate", "hold"])
def test_what_lies_on_the_device_is_what_was_foreseen(late, monkeypatch, carry):
    """Within a tenth: D as it is made, what is brought, and what is still on its way."""
    model, inputs = make_tiny("HunyuanVideoTransformer3DModel")
    seen, peak = [], 0
    refresh, bring = layer_carry.refresh, LateLane.bring

    def look(value):
        nonlocal peak
        seen.append(weakref.ref(value.untyped_storage()))
        alive = {id(x): x.nbytes() for ref in seen if (x := ref()) is not None}
        peak = max(peak, sum(alive.values()))

    def refreshed(*args, **options):
        o, difference = refresh(*args, **options)
        look(difference)
        return o, difference

    def brought(lane, host):
        value, event = bring(lane, host)
        look(value)
        return value, event

    monkeypatch.setattr(layer_carry, "refresh", refreshed)
    monkeypatch.setattr(LateLane, "bring", brought)
    recipe = RECIPE.replace(carry=carry, history_device="host")
    shapes = call_shapes(model, find_adapter(model).sites(model), inputs)
    foreseen = kept_bytes(recipe, shapes, "cuda")
    outputs(model, inputs, recipe)
    assert foreseen.tiles == 0 < peak
    assert abs(foreseen.passing - peak) <= 0.1 * peak


@pytest.mark.slow
def test_what_was_sent_is_let_go_behind_the_next_attention(late, monkeypatch):
    """Where D of a layer is projected, nothing is left on the device of the layer before."""
    model, inputs = make_tiny("HunyuanVideoTransformer3DModel")
    lanes, held = set(), []
    attend, send = layer_carry.refresh, LateLane.send

    def project(rows, weight):
        held[-1].append(sum(len(lane._leaving) for lane in lanes))
        return real(rows, weight)

    real = layer_carry._projected
    monkeypatch.setattr(layer_carry, "_projected", project)
    monkeypatch.setattr(
        layer_carry, "refresh", lambda *args, **given: held.append([]) or attend(*args, **given)
    )
    monkeypatch.setattr(
        LateLane, "send", lambda lane, *given: lanes.add(lane) or send(lane, *given)
    )
    outputs(model, inputs, RECIPE.replace(history_device="host"))
    assert len(held) > 2 and {each[0] for each in held} == {0}


@pytest.mark.parametrize("how", ["dropped", "put anew"])
def test_memory_is_not_reused_before_the_copy_into_it(how):
    """Also where nobody asks for what comes: caches go when columns change or a call fails."""
    lane = LateLane(torch.device("cpu"))
    kept = storage.Kept(storage.Storage(lane=lane))
    kept.put(torch.ones(3))
    kept.prefetch()
    event, *_ = lane._under_way[-1]
    if how == "dropped":
        del kept
    else:
        kept.put(torch.zeros(3))
    assert event not in [each for each, *_ in lane._under_way]


@pytest.mark.parametrize("again", [False, True])
def test_a_refresh_needs_no_more_than_what_it_takes_differences_to(late, monkeypatch, again):
    """The last change of D, which is made anew, stays where it is; so does D of other columns."""
    model, inputs = make_tiny("FluxTransformer2DModel")
    layers = len(find_adapter(model).sites(model))
    brought, bring, started, run = [], LateLane.bring, [], block.LayerRun
    monkeypatch.setattr(
        block,
        "LayerRun",
        lambda *given, **more: started.append(len(brought)) or run(*given, **more),
    )
    monkeypatch.setattr(
        LateLane, "bring", lambda lane, host: brought.append(host) or bring(lane, host)
    )
    recipe = RECIPE.replace(history_device="host", choose_at=(1, 4) if again else (1,))
    with flashomni.accelerate(model, recipe) as engine:
        counts = []
        for step in range(STEPS):
            engine.step(step, STEPS + 1)
            before = len(brought)
            call(model, inputs)
            counts.append(len(brought) - before)
            if step == 3:  # a block before it is used
                ahead = [count - before for count in started[-layers:]]
                assert ahead == [0, *range(2, layers + 1)]
        does = [step["does"] for step in engine.report().steps]
    assert [i for i, each in enumerate(does) if "refreshes" in each] == [1, 4, 7]
    second = [0, 1, 1, 1] if again else [1, 2, 2, 1]
    assert counts == [layers * count for count in (0, 0, 1, 1, *second)]
