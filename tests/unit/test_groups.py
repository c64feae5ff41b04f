"""Groups of layers: a schedule and a forecast of their own, in one recipe."""

import json

import pytest
import torch

import flashomni
from conftest import STEPS, call, generation
from flashomni.engine import Recipe
from flashomni.engine.groups import Division
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")
EVERY = {"name": "interval", "interval": 3, "warmup": 0.2}
OFTEN = {"name": "interval", "interval": 2, "warmup": 0.2}
LINE = {"name": "taylor", "layer_order": 1, "order": 1}
REUSE = {"name": "reuse", "layer_order": 0, "order": 0}
NAMES = [f"dual.{i}" for i in range(4)] + [f"single.{i}" for i in range(6)]


def group(layers, schedule=EVERY, forecast=LINE):
    return {"layers": layers, "schedule": schedule, "forecast": forecast}


def cached(groups=(), **more):
    recipe = Recipe.of(make_policy("cached"), degrade_below=1.0)
    return recipe.replace(**{"schedule": EVERY, **more}, forecast=LINE, groups=list(groups))


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("0:4", range(4)),
        ("-3:", (7, 8, 9)),
        (":", range(10)),
        ("single.*", range(4, 10)),
        ("dual.2", (2,)),
        ([0, -1, "4:6"], (0, 4, 5, 9)),
    ],
)
def test_layers_are_chosen_by_place_or_name(layers, chosen):
    division = Division.make(cached([group(layers, OFTEN, REUSE)]), NAMES)
    assert {i for i, of in enumerate(division.of) if of == 0} == set(chosen)
    assert division.recipes[0].schedule.interval == 2 and not division.recipes[0].groups
    assert len(division.recipes) == (1 if len(list(chosen)) == len(NAMES) else 2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("triple.*", r"'triple.\*' of a group selects none of this model's 10 layers, dual.0"),
        ("20:", "selects none"),
        ([3, 12], "12 of a group selects none"),
    ],
)
def test_a_group_without_layers_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Division.make(cached([group(layers)]), NAMES)


def test_a_layer_has_one_group():
    with pytest.raises(ValueError, match=r"dual.2 is in two groups, 'dual.\*' and '2:5'"):
        Division.make(cached([group("dual.*"), group("2:5")]), NAMES)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": "0:2"}, "a group has layers, and of schedule, forecast, policy, sparse"),
        (group(""), "layers must be a range"),
        (group([]), "layers must be a range"),
        (group([True]), "layers must be a range"),
        ({"layers": "0:2", "policy": None}, "a group must have one of schedule, forecast, policy"),
        ({"layers": "0:2", "sparse": {"token_order": "tile"}}, "token_order of a group must be"),
        ({"layers": "0:2", "sparse": {"kv_density": 0.5}}, "sparse has degrade_below"),
        (group("0:2", {"name": "tea"}), "schedule must be one of"),
        (group("0:2", EVERY, {"name": "taylor", "level": "output"}), "must be 'layers'"),
        (3, "a group has layers, and of .* got 3"),
    ],
)
def test_groups_that_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        cached([bad])


def test_groups_do_not_go_with_the_output_level():
    with pytest.raises(ValueError, match="where there are groups of layers"):
        cached([group("0:2")]).replace(level="output")


SPARSE = {"in_computed": True, "choose_at": "computed", "degrade_below": 1.0}
HALF = {"layers": "0:1", "policy": {"name": "topk", "kv_density": 0.5}, "sparse": SPARSE}


def test_layers_are_sparse_where_their_group_says_so(tiny):
    """In the steps that compute, also where the output of the whole model is forecast between."""
    model, inputs = tiny
    plain = cached().replace(level="output")
    found = []
    for layers, of in ((None, plain), ("0:1", plain), ("0:1", cached()), (":", plain)):
        groups = [] if layers is None else [{**HALF, "layers": layers}]
        with flashomni.accelerate(model, of.replace(groups=groups)) as engine:
            found.append((generation(engine, model, inputs), engine.report()))
    spent = [report.attention_spent for _, report in found]
    assert spent[0] > spent[1] > spent[3] and spent[1] == pytest.approx(spent[2], abs=1e-6)
    everywhere = plain.replace(policy=HALF["policy"], sparse=SPARSE)
    with flashomni.accelerate(model, everywhere) as engine:
        assert torch.equal(generation(engine, model, inputs), found[3][0])
    assert [each["policy"] for each in found[1][1].groups] == ["topk", "cached"]


def test_a_group_at_the_output_level_is_used_in_computed_steps():
    with pytest.raises(ValueError, match="a group's policy must be 'cached', got 'topk'"):
        groups = [{"layers": "0:1", "policy": {"name": "topk"}}]
        cached().replace(level="output").replace(groups=groups)


def test_groups_go_to_json_and_back(tmp_path):
    recipe = cached([group("0:2", OFTEN, REUSE), group([2, -1]), {**HALF, "layers": "3:5"}])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    recipe.save(tmp_path / "groups.json")
    assert Recipe.of(tmp_path / "groups.json") == recipe


@pytest.mark.covering(1)
@pytest.mark.parametrize("policy", ["cached", "topk"])
def test_a_group_of_everything_is_no_group(tiny, policy):
    """Bit for bit, tiles and whole layers alike."""
    model, inputs = tiny
    topk = Recipe.of("topk", schedule=EVERY, forecast=LINE)
    plain = cached().replace(level="layers") if policy == "cached" else topk
    other = plain.replace(schedule=OFTEN, groups=[group(":", EVERY, LINE)])
    with flashomni.accelerate(model, plain) as engine:
        expected = generation(engine, model, inputs)
    with flashomni.accelerate(model, other) as engine:
        assert torch.equal(generation(engine, model, inputs), expected)


def test_two_groups_alike_are_one(tiny):
    """The forecast of a sum is the sum of the forecasts, up to rounding."""
    model, inputs = tiny
    with flashomni.accelerate(model, cached().replace(level="layers")) as engine:
        expected = generation(engine, model, inputs)
    with flashomni.accelerate(model, cached([group("0:2")])) as engine:
        got = generation(engine, model, inputs)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_each_group_keeps_its_schedule(tiny):
    """Layers of one compute where layers of another are cached, and the report says which."""
    model, inputs = tiny
    with flashomni.accelerate(model, cached([group("0:1", OFTEN, REUSE)])) as engine:
        first = generation(engine, model, inputs)
        report = engine.report()
        assert torch.equal(generation(engine, model, inputs), first)
    often = {0, 1, 3, 5, 7, 9}
    every = {0, 1, 4, 7, 9}
    for step in report.steps:
        head, *rest = step["layer_kinds"]
        assert (head == "bypass") == (step["step"] not in often)
        assert {kind == "bypass" for kind in rest} == {step["step"] not in every}
        assert (step["kind"] == "dispatch") == (step["step"] not in often | every)
    assert [found["computed"] for found in report.groups] == [len(often), len(every)]
    assert f"computed in {len(often)} of {STEPS} calls, schedule interval, forecast reuse" in str(
        report
    )


def test_branches_have_their_own_groups(tiny):
    """Two branches with the same inputs do the same."""
    model, inputs = tiny
    with flashomni.accelerate(model, cached([group("1:", OFTEN, REUSE)])) as engine:
        for step in range(STEPS):
            outputs = []
            for branch in ("cond", "uncond"):
                engine.step(step, STEPS, branch)
                outputs.append(call(model, inputs))
            assert torch.equal(*outputs)
        kinds = [step["layer_kinds"] for step in engine.report().steps]
    assert kinds[::2] == kinds[1::2]


def test_a_still_model_is_met_exactly(tiny):
    """Where nothing changes, every forecast is right: what is cached replaces what is computed."""
    model, inputs = tiny
    stock = call(model, inputs)
    with flashomni.accelerate(model, cached([group([0, -1], OFTEN, REUSE)])) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS)
            torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)


def test_a_dense_recipe_skips_where_a_group_does():
    """What is kept of its layers has to be counted, and their Dispatch steps are not all alike."""
    groups = [{"layers": "0:1", "policy": {"name": "cached"}}]
    assert not Recipe.of("lossless").skips
    assert Recipe.of("lossless").replace(groups=groups).skips


def test_a_group_that_skips_alone_is_something_gained(tiny, caplog):
    """Steps that compute a part of the layers are no Dispatch steps, and skip all the same."""
    model, inputs = tiny
    always = {"name": "steps", "steps": list(range(STEPS)), "of": STEPS, "min_steps": 0}
    recipe = cached([group("0:1", EVERY), group("1:", always)], schedule=always)
    with flashomni.accelerate(model, recipe) as engine:
        generation(engine, model, inputs)
        assert engine.report().flops_skipped > 0
    assert "nothing to gain" not in caplog.text
