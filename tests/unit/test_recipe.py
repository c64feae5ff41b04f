"""Recipes: JSON there and back, and a sentence for everything that is wrong with one."""

import json
import os

import pytest

from flashomni.engine import Recipe, presets
from flashomni.policies import make_policy, policies

NAMES = sorted({*presets(), *policies()})


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path):
    """Every preset and every policy's name gives a recipe that survives JSON and disk."""
    recipe = Recipe.of(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    path = tmp_path / "folder" / "recipe.json"
    recipe.save(path)
    assert Recipe.of(path) == Recipe.of(str(path)) == Recipe.of(recipe) == recipe


def test_presets_are_what_they_say():
    """The four presets exist under their own names; lossless computes everything."""
    assert presets() == ["balanced", "fast", "lossless", "quality"]
    assert all(Recipe.of(name).name == name for name in presets())
    assert not Recipe.of("lossless").policy.caches


def test_a_policy_brings_its_own_settings():
    """taylorseer forecasts whole layers with order 1, fora reuses them."""
    assert Recipe.of("taylorseer").layer_order == 1 and Recipe.of("fora").layer_order == 0
    assert Recipe.of("fora").degrade_below == 1.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", "topk", "policy must be a Policy"),
        ("name", "", "name must be a non-empty string"),
        ("interval", 0, "interval must be an integer from 1 to 1000, got 0"),
        ("interval", 2.5, "interval must be an integer"),
        ("interval", True, "interval must be an integer"),
        ("warmup", float("nan"), "warmup must be a number from 0.0 to 1.0, got nan"),
        ("warmup", "0.2", "warmup must be a number"),
        ("forecast", "fourier", "forecast must be one of hermite, taylor, got 'fourier'"),
        ("order", 4, "order must be an integer from 0 to 3, got 4"),
        ("layer_order", -1, "layer_order must be an integer from 0 to 3"),
        ("degrade_below", 1.5, "degrade_below must be a number from 0.0 to 1.0"),
        ("min_skip", -0.1, "min_skip must be a number from 0.0 to 1.0"),
        ("block_m", 100, "block_m must be a multiple of 16, got 100"),
        ("block_n", 8, "block_n must be an integer from 16 to 1024, got 8"),
        (
            "history_dtype",
            "int4",
            "history_dtype must be one of compute, bfloat16, float16, float8",
        ),
        ("history_device", "moon", "history_device must be one of compute, host"),
    ],
)
def test_values_out_of_range(field, value, message):
    """The error names the field, what it got and what is allowed."""
    with pytest.raises(ValueError, match=message):
        Recipe(**{"policy": make_policy("dense"), field: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("\xff\xfe", "must be a JSON object|cannot be read"),
        ("[]", "a recipe must be a JSON object, got list"),
        ("{}", "policy must be"),
        ('{"policy": "topk"}', "policy must be"),
        ('{"policy": {"name": 3}}', "policy must be"),
        ('{"policy": {"name": "magic"}}', "policy must be one of cached, dense"),
        ('{"policy": {"name": "topk", "q_density": NaN}}', "q_density must be a number"),
        ('{"policy": {"name": "dense"}, "speed": 9}', "a recipe has policy, name, .*got 'speed'"),
        ('{"policy": {"name": "dense"}, "format": 2}', "format of a recipe must be 1, got 2"),
        ('{"policy": {"name": "dense"}, "order": "two"}', "order must be an integer"),
    ],
)
def test_corrupt_files(tmp_path, content, message):
    """A ValueError that names the file and what is wrong in it."""
    path = tmp_path / "recipe.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        Recipe.of(path)
    assert "recipe.json" in str(error.value)


def test_unknown_names_list_the_known(tmp_path):
    """Neither a preset nor a policy nor a file."""
    with pytest.raises(ValueError, match=r"a preset \(balanced, .*\(cached, dense, .*'swift'"):
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
    """Of the recipe or of its policy; the whole word becomes the name."""
    recipe = Recipe.of("balanced:interval=3,tau_q=.5,combine=mean,similarity_gate=null")
    assert recipe.name == "balanced:interval=3,tau_q=.5,combine=mean,similarity_gate=null"
    assert (recipe.interval, recipe.policy.tau_q, recipe.policy.combine) == (3, 0.5, "mean")
    base = Recipe.of("balanced")
    assert recipe.warmup == base.warmup and recipe.policy.tau_kv == base.policy.tau_kv
    assert Recipe.of("fora:interval=2").degrade_below == Recipe.of("fora").degrade_below
