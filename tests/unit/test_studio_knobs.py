"""The studio's controls: every setting has one, and moving it gives the recipe that it says."""

import dataclasses
import json

import pytest

from flashomni.engine import Recipe
from flashomni.engine.recipe import methods, presets
from flashomni.policies import policies
from flashomni.studio import knobs

pytest_plugins = ["studio_pages"]
# Settings that are neither a value nor a list of numbers; the recipe's JSON has them.
NO_CONTROL = {*knobs.NO_CONTROL, "forecast.fitted", "sparse.amounts", "policy.stride"}


@pytest.mark.parametrize("name", [*presets(), *methods(), *policies()])
def test_every_setting_of_a_recipe_has_a_control(name):
    """A new setting has one too, or is named here."""
    recipe = Recipe.of(name)
    found = {knob.key: knob for knob in knobs.knobs(recipe, 28)}
    wanted = {
        f"{part}.{field.name}"
        for part in knobs.PARTS
        for field in dataclasses.fields(getattr(recipe, part))
    } - {"forecast.name"}
    assert wanted - set(found) <= NO_CONTROL
    assert {(k.key, k.owner) for k in found.values()} <= {(k.key, k.owner) for k in knobs.every(28)}
    for knob in found.values():
        assert knob.says, f"{knob.key} does not say what it does"
        if knob.kind == "choice":
            assert knob.value in knob.choices
        elif knob.kind in ("integer", "number") and knob.value is not None:
            assert knob.low <= knob.value <= knob.high


@pytest.mark.parametrize("name", ["balanced", "sta", "teacache", "pab"])
def test_a_control_that_does_not_move_changes_nothing(name):
    """The page's numbers are floats; the recipe's stay what they are."""
    recipe = Recipe.of(name)
    for knob in knobs.knobs(recipe, 28):
        if knob.value is not None and knob.key != knobs.COMPUTED:
            value = float(knob.value) if knob.kind == "integer" else knob.value
            assert knobs.turned(recipe, knob.key, value, 28) == recipe, knob.key


def test_every_control_is_in_one_group():
    """And what matters is in the first ones."""
    found = knobs.knobs(Recipe.of("flashomni", computed=10), 28)
    groups = knobs.grouped(found)
    assert sorted(k.key for group in groups for k in group) == sorted(k.key for k in found)
    assert len(groups) == len(knobs.GROUPS) and groups[0][0].key == knobs.COMPUTED
    assert {"policy.tau_kv", "policy.protect_text", "sparse.summaries", "sparse.refresh"} <= {
        knob.key for knob in groups[2]
    }


def test_computed_steps_move_whatever_the_schedule_was():
    """A ramp of as many; schedules that decide as they go have no such control."""
    turned = knobs.turned(Recipe.of("balanced"), knobs.COMPUTED, 5.0, 20)
    assert knobs.computed_steps(turned, 20) == 5
    late = Recipe.of("teacache")
    assert knobs.computed_steps(late, 20) is None
    assert knobs.COMPUTED not in [knob.key for knob in knobs.knobs(late, 20)]


def test_turning_a_control(session):
    """Dotted keys, parts by name, lists as on the command line; a wrong value changes nothing."""
    assert session.turn("sparse.carry", "hold").sparse.carry == "hold"
    assert session.turn("policy", "topk").policy.name == "topk"
    assert session.turn("policy.kv_density", 0.25).policy.kv_density == 0.25
    assert session.turn("sparse.choose_at", "[0,5]").sparse.choose_at == (0, 5)
    assert knobs.changes(session.base, session.recipe) == [
        "policy topk", "kv density 0.25", "choose at (0, 5)", "carry hold",
    ]  # fmt: skip
    before = session.recipe
    for key, value in (("policy.kv_density", 2.0), ("schedule.computed", 1), ("moon.phase", 1)):
        with pytest.raises(ValueError):
            session.turn(key, value)
    assert session.recipe == before and before.name == "balanced-edited"


def test_an_emptied_box_is_refused(session):
    """Like any other value that is not allowed."""
    with pytest.raises(ValueError, match="computed steps must be a number"):
        session.turn(knobs.COMPUTED, None)


def test_the_recipe_as_a_file(session):
    """What is downloaded is the recipe; a name is no path."""
    session.turn("schedule.computed", 4)
    assert Recipe.load(session.recipe_file()) == session.recipe
    session.choose(session.recipe.replace(name="../../etc/x y"))
    path = session.recipe_file()
    assert path.parent == session.folder and Recipe.load(path) == session.recipe


def test_a_recipe_that_is_no_recipe_is_refused(session, tmp_path):
    """A file that somebody opens."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"policy": {"name": "moon"}}))
    with pytest.raises(ValueError, match="moon"):
        session.choose(path)
    assert session.recipe == Recipe.of("balanced")
