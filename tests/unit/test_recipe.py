"""Recipes: JSON and YAML there and back, and a sentence for everything that is wrong with one."""

import json
import os
from dataclasses import dataclass

import pytest

from flashomni.engine import Recipe, StepKind, presets
from flashomni.engine.recipe import methods
from flashomni.engine.recipe_parts import SparseSettings
from flashomni.engine.schedules import make_schedule
from flashomni.policies import POLICIES, Policy, make_policy, policies, policy
from flashomni.symbols import Grid

NAMES = sorted({*presets(), *methods(), *policies()})
# What version 0.1 wrote for `balanced`, with settings of its own in every place.
FLAT = {
    "format": 1,
    "policy": {"name": "flashomni", "tau_q": 0.9, "tau_kv": 0.0, "power": 0.0},
    "name": "mine",
    "interval": 4,
    "warmup": 0.25,
    "forecast": "hermite",
    "order": 2,
    "layer_order": 3,
    "degrade_below": 0.5,
    "min_skip": 0.1,
    "block_m": 64,
    "block_n": 64,
    "history_dtype": "float8",
    "history_device": "host",
}


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    """Every preset, method and policy's name gives a recipe that survives JSON, YAML and disk."""
    recipe = Recipe.of(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))
    path = tmp_path / "folder" / "recipe.json"
    recipe.save(path)
    assert Recipe.of(path) == Recipe.of(str(path)) == Recipe.of(recipe) == recipe
    for suffix in (".yaml", ".YML"):
        other = path.with_suffix(suffix)
        other.write_text(path.read_text())  # JSON is YAML
        assert Recipe.of(other) == recipe


def test_presets_are_what_they_say():
    """Five presets, and methods of papers, under their own names; lossless computes everything."""
    assert presets() == ["balanced", "fast", "lossless", "quality", "video"]
    assert all(Recipe.of(name).name == name for name in (*presets(), *methods()))
    assert not Recipe.of("lossless").skips and all(Recipe.of(m).skips for m in methods())


def test_methods_bring_their_own_settings():
    """taylorseer forecasts whole layers with order 1, fora reuses them."""
    fora, taylorseer = (Recipe.of(name) for name in ("fora", "taylorseer"))
    assert (fora.forecast.layer_order, taylorseer.forecast.layer_order) == (0, 1)
    for recipe in (fora, taylorseer):
        assert recipe.policy.name == "cached" and recipe.sparse.degrade_below == 1.0


def test_a_recipe_names_what_runs_without_text():
    """A policy that needs text gives way to another where there is none, if one is named."""
    recipe = Recipe.of("flashomni", policy_without_text="cached")
    assert recipe.policy_for(Grid(256, 256, (0, 32))) is recipe.policy
    assert recipe.policy_for(Grid(256, 256)).name == "cached"
    alone = recipe.replace(policy_without_text=None)
    assert alone.policy_for(Grid(256, 256)) is alone.policy
    assert Recipe.of("topk", policy_without_text="cached").policy_for(Grid(64, 64)).name == "topk"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", 3, "policy must be a Policy"),
        ("policy", "magic", "policy must be one of cached, dense"),
        ("name", "", "name must be a non-empty string"),
        ("schedule", 3, "schedule must be a Schedule, got 3"),
        ("schedule", "tea", "schedule must be one of adaptive, .*steps, .*got 'tea'"),
        ("interval", 0, "interval must be an integer from 1 to 1000, got 0"),
        ("interval", 2.5, "interval must be an integer"),
        ("interval", True, "interval must be an integer"),
        ("min_steps", -1, "min_steps must be an integer from 0"),
        ("warmup", float("nan"), "warmup must be a number"),
        ("warmup", "0.2", "warmup must be a number from 0.0 to 1.0, got '0.2'"),
        ("warmup", 10**400, "warmup must be a number"),
        ("steps", [0, 9, 3], "steps must be ascending"),
        ("steps", 3, "steps must be ascending"),
        ("forecast", "fourier", "forecast must be one of chebyshev, .*taylor, got 'fourier'"),
        ("forecast", {"speed": 3}, "forecast has name, order, .*; got 'speed'"),
        ("order", 4, "order must be an integer from 0 to 3, got 4"),
        ("layer_order", -1, "layer_order must be an integer from 0 to 3"),
        ("level", "pixels", "level must be one of auto, layers, output, got 'pixels'"),
        ("level", "output", "policy must be 'cached', got 'dense'"),
        ("degrade_below", 1.5, "degrade_below must be a number from 0.0 to 1.0"),
        ("min_skip", -0.1, "min_skip must be a number from 0.0 to 1.0"),
        ("block_m", 100, "block_m must be a multiple of 16, got 100"),
        ("block_n", 8, "block_n must be an integer from 16 to 1024, got 8"),
        ("sparse", 3, "sparse must be a SparseSettings, got 3"),
        (
            "history_dtype",
            "int4",
            "history_dtype must be one of compute, bfloat16, float16, float8",
        ),
        ("history_device", "moon", "history_device must be one of compute, host"),
        ("policy_without_text", 3, "policy_without_text must be a Policy or None, got 3"),
        ("speed", 9, "settings of custom are policy, name, schedule, .*interval.*; got 'speed'"),
        ("tau_q", 0.5, "settings of custom are .*; got 'tau_q'"),
        ("intervall", 3, r"got 'intervall'; did you mean 'interval'\?"),
    ],
)
def test_values_out_of_range(field, value, message):
    """The error names the setting, what it got and what is allowed; wherever it is said."""
    with pytest.raises(ValueError, match=message):
        Recipe.of(make_policy("dense"), **{field: value})
    with pytest.raises(ValueError, match=message):
        Recipe(policy=make_policy("dense")).replace(**{field: value})


def test_unknown_names_list_the_known(tmp_path):
    """Neither a preset nor a policy nor a file."""
    known = r"a preset \(balanced, .*a method \(.*fora, .*a policy \(cached, .*'swift'"
    with pytest.raises(ValueError, match=known):
        Recipe.of("swift")
    with pytest.raises(ValueError, match="cannot be read"):
        Recipe.of(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="recipe must be a Recipe, a name or a path, got 3"):
        Recipe.of(3)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    """If the disk fails, the old file stays and no temporary one is left."""
    path = tmp_path / "recipe.json"
    Recipe.of("lossless").save(path)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Recipe.of("fast").save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_settings_may_follow_a_name():
    """Of any part; the whole word becomes the name."""
    text = "flashomni:interval=3,tau_q=.5,combine=mean,similarity_gate=null,forecast=hermite"
    recipe = Recipe.of(text)
    assert recipe.name == text
    assert (recipe.schedule.interval, recipe.policy.tau_q, recipe.policy.combine) == (
        3,
        0.5,
        "mean",
    )
    base = Recipe.of("flashomni")
    assert recipe.schedule.min_steps == base.schedule.min_steps  # both schedules have it
    assert recipe.schedule.name == "interval" and recipe.forecast.name == "hermite"
    assert recipe.policy.tau_kv == base.policy.tau_kv
    assert Recipe.of("fora:interval=2").sparse == Recipe.of("fora").sparse
    assert Recipe.of("fora:steps=[0,1,4,7],of=8,min_steps=4").schedule.steps == (0, 1, 4, 7)
    for wrong in ("fora:interval", "fora:", "fora:interval=2,interval=3", "fora:=2", "fora:order="):
        with pytest.raises(ValueError):
            Recipe.of(wrong)
    for deep in ("[" * 100_000, "9" * 400, "9" * 9000, "nan", "[[1]]"):
        with pytest.raises(ValueError, match="warmup must be a number"):
            Recipe.of(f"fora:warmup={deep}")


def test_settings_as_keywords():
    """The same recipe under the same name, which gives it back."""
    said, typed = (
        Recipe.of("flashomni", interval=3, tau_q=0.5),
        Recipe.of("flashomni:interval=3,tau_q=.5"),
    )
    assert said == typed.replace(name=said.name) and Recipe.of(said.name) == said
    more = Recipe.of("fora:interval=3", steps=[0, 1, 5], of=8)
    assert more.name == "fora:interval=3,steps=[0,1,5],of=8"
    named = Recipe.of("topk", name="mine", q_density=0.5, order=0)
    assert (named.name, named.policy.q_density, named.forecast.order) == ("mine", 0.5, 0)
    assert Recipe.of(named, interval=2).name == "mine"
    with pytest.raises(ValueError, match="interval is given twice"):
        Recipe.of("fora:interval=3", interval=4)


def test_a_setting_selects_its_schedule():
    """interval=3 on a list of steps gives the interval; what both have stays."""
    ramp = Recipe.of("fora", steps=[0, 1, 4, 9], of=10, min_steps=6)
    assert ramp.schedule == make_schedule("steps", steps=(0, 1, 4, 9), of=10, min_steps=6)
    back = ramp.replace(interval=3)
    assert back.schedule == make_schedule("interval", interval=3, min_steps=6)
    assert ramp.replace(min_steps=0, interval=3).schedule.min_steps == 0
    assert ramp.replace(schedule={"name": "interval"}).schedule == make_schedule("interval")
    with pytest.raises(ValueError, match="schedule must be a Schedule, got 3"):
        Recipe.of("fora", schedule=3, order=1)
    assert Recipe.of("fora", schedule=3, interval=3).schedule.interval == 3
    with pytest.raises(ValueError, match="settings of, interval belong to no schedule"):
        Recipe.of("fora", interval=3, of=4, schedule="steps")


def test_parts_as_objects_names_and_mappings():
    """replace takes whole parts, and some of their settings."""
    recipe = Recipe.of("balanced")
    assert recipe.replace(policy="topk").policy == make_policy("topk")
    assert recipe.replace(policy={"name": "topk", "q_density": 0.25}).policy.q_density == 0.25
    assert recipe.replace(forecast={"order": 3}).forecast.layer_order == recipe.forecast.layer_order
    assert recipe.replace(sparse=SparseSettings(block_m=64)).sparse.degrade_below == 0.0
    assert recipe.replace(policy="topk", q_density=0.25).policy.q_density == 0.25
    assert recipe.order == 2 and recipe.replace(layer_order=0).order == 1


def test_lists_are_frozen():
    """Nobody changes a recipe through a list that it was made from, or that it gives."""
    steps = [0, 1, 4]
    recipe = Recipe.of("fora", steps=steps, of=6)
    steps.append(5)
    recipe.to_dict()["schedule"]["steps"].append(5)
    assert recipe.schedule.steps == (0, 1, 4) and isinstance(hash(recipe), int)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_policies_of_a_script_keep_their_class():
    """By name where they are registered; changing other settings never swaps the object."""
    before = set(policies())

    @policy("banded")
    @dataclass(frozen=True)
    class Banded(Policy):
        bands: object = None

    try:
        recipe = Recipe.of(Banded(bands=[3, 4]), interval=2, degrade_below=0.5)
        assert type(recipe.policy) is Banded and recipe.schedule.interval == 2
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe and type(again.policy) is Banded and again.policy.bands == [3, 4]
        assert Recipe.of("banded:bands=[5,6]").policy.bands == [5, 6]
    finally:
        for name in set(policies()) - before:
            POLICIES.remove(name)

    kept = Banded(bands=[3, 4])  # nobody can ask for it by name any more, but here it is
    assert Recipe.of(kept).replace(interval=2, order=0).policy is kept

    class Unregistered(type(make_policy("topk"))):
        pass

    with pytest.raises(ValueError, match="Unregistered is not registered"):
        Recipe.of(Unregistered(q_density=0.5), interval=2)


def test_format_1_is_read(tmp_path):
    """Flat keys in their places; the same values; with and without its number."""
    for data in (FLAT, {key: value for key, value in FLAT.items() if key != "format"}):
        path = tmp_path / "old.json"
        path.write_text(json.dumps(data))
        recipe = Recipe.of(path)
        assert recipe.schedule == make_schedule("interval", interval=4, warmup=0.25)
        assert recipe.to_dict()["forecast"] == {
            "name": "hermite", "order": 2, "layer_order": 3, "level": "auto", "fitted": None,
        }  # fmt: skip
        assert recipe.to_dict()["storage"] == {"history_dtype": "float8", "history_device": "host"}
        assert recipe.sparse == SparseSettings(
            degrade_below=0.5, min_skip=0.1, block_m=64, block_n=64
        )
        assert recipe.name == "mine" and recipe.policy.tau_q == 0.9
        assert recipe.policy_without_text is None
        assert recipe.to_dict()["format"] == 2 and Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("method", ["fora", "taylorseer"])
def test_methods_of_format_1(method):
    """Policies that were methods become the policy cached with what the method asks for."""
    new = Recipe.of(method)
    for data in (
        {"format": 1, "name": method, "policy": {"name": method}},
        {"name": method, "policy": {"name": method}},
    ):
        old = Recipe.from_dict(data)
        assert old.policy == new.policy and old.sparse == new.sparse
        assert old.forecast.layer_order == new.forecast.layer_order
    slow = Recipe.from_dict({"policy": {"name": method}, "interval": 2, "layer_order": 3})
    assert (slow.schedule.interval, slow.forecast.layer_order) == (2, 3)


def test_output_level():
    """The model's output alone is cached: the policy must cache everything."""
    recipe = Recipe.of("fora:level=output,layer_order=2")
    assert recipe.forecast.level == "output" and Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="policy must be 'cached', got 'flashomni'"):
        Recipe.of("flashomni", level="output")


def test_a_plan_for_both_orders():
    """As many steps record as the higher of the two orders asks for."""
    plan = Recipe.of("fora", order=1, layer_order=2, warmup=0.5).plan(12)
    assert sum(plan.records) == 2 and plan.kinds[5] is StepKind.UPDATE
