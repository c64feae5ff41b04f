"""The section ``sparse`` of a recipe: what steps do by it, what it refuses, how it is saved."""

import pytest

from flashomni.engine import Recipe
from flashomni.engine.schedules import StepKind
from flashomni.engine.sparse_settings import Marks, SparseSettings, SparseStep


def steps_of(settings, kinds):
    """What each step does, one after the other."""
    marks, found = Marks(), []
    for step, kind in enumerate(kinds):
        did = settings.step(StepKind(kind), step, marks)
        found.append(did)
        if kind != "dispatch":
            refreshed = step if did.refreshes else marks.refreshed
            since = 0 if did.refreshes else marks.since + 1
            marks = Marks(step if did.chooses else marks.chosen, refreshed, since)
    return found


def words(found):
    """c: chooses, r: refreshes, s: skips, d: dense."""
    names = [("c" * x.chooses) + ("r" if x.refreshes else "s" if x.skips else "d") for x in found]
    return " ".join(names)


@pytest.mark.parametrize(
    ("settings", "kinds", "expected"),
    [
        ({}, ["full", "update", "dispatch", "update"], "d cd d cd"),
        ({"in_computed": True}, ["full", "update", "dispatch", "full"], "d cs s s"),
        ({"choose_at": "computed", "in_computed": True}, ["full"] * 3, "cs cs cs"),
        (
            {"choose_at": "computed", "in_computed": True, "dense_steps": 2},
            ["full"] * 4,
            "d cd cs cs",
        ),
        ({"choose_at": (2,), "in_computed": True}, ["full"] * 4, "d d cs s"),
        ({"choose_at": (1, 3), "in_computed": True}, ["full", "dispatch", "full", "full"],
         "d d cs cs"),
        (
            {"choose_at": (1,), "in_computed": True, "carry": "hold", "refresh": 3},
            ["full"] * 9,
            "d cr s s r s s r s",
        ),
        (
            {"choose_at": (0, 3), "in_computed": True, "carry": "hold", "refresh": 0},
            ["full"] * 5,
            "cr s s cr s",
        ),
        (
            {"choose_at": (1,), "in_computed": True, "carry": "hold", "refresh": 2,
             "dense_steps": 3},
            ["full"] * 6,
            "d cr r s r s",
        ),
        ({"carry": "hold"}, ["full", "update", "dispatch", "update"], "d cr d cr"),
        (
            {"choose_at": (0,), "in_computed": True, "carry": "hold", "refresh": 2},
            ["full", "dispatch", "update", "dispatch", "dispatch", "update"],
            "cr s s s s r",
        ),
    ],
)  # fmt: skip
def test_what_steps_do(settings, kinds, expected):
    """Of schedules written out; a Dispatch step is sparse in layers that are computed even so."""
    assert words(steps_of(SparseSettings(**settings), kinds)) == expected


def test_the_default_is_as_before():
    """Columns are chosen at every Update, computed steps are dense, nothing is carried."""
    for kind in StepKind:
        did = SparseSettings().step(kind, 3, Marks())
        assert did == SparseStep(chooses=kind is StepKind.UPDATE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choose_at": "never"}, "choose_at must be update, computed or a list of ascending"),
        ({"choose_at": [3, 1]}, "ascending step numbers, got"),
        ({"choose_at": []}, "ascending step numbers, got"),
        ({"summaries": 3}, "summaries must be one of 0, 1, 4, 16, got 3"),
        ({"carry": "yes"}, "carry must be one of off, hold, extrapolate, got 'yes'"),
        ({"refresh": -1}, "refresh must be an integer from 0 to 1000"),
        ({"extrapolation": 3.0}, "extrapolation must be a number from 0.0 to 2.0"),
        ({"amounts": [[0.5, 0.2], [0.1, 0.2]]}, "progress ascending"),
        ({"amounts": [[0.5, 2.0]]}, "both from 0 to 1"),
        ({"summaries": 16, "block_n": 1000}, "block_n must be a multiple of"),
        (
            {"carry": "hold", "in_computed": True, "choose_at": "computed"},
            "carry makes every step dense in which columns are chosen",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseSettings(**settings)


def test_a_recipe_with_all_of_it_makes_the_round_trip(tmp_path):
    """JSON and YAML; dotted names; amounts only where the policy has one."""
    recipe = Recipe.of(
        "topk", choose_at=[3, 14], in_computed=True, dense_steps=4, amounts=[[0, 0.5], [1, 0.25]],
        summaries=4, carry="extrapolate", refresh=3, extrapolation=0.4, measure=True,
    )  # fmt: skip
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    yaml = "name: a\npolicy: {name: topk}\nsparse: {carry: hold, choose_at: [2], summaries: 1}\n"
    (tmp_path / "recipe.yaml").write_text(yaml)
    assert Recipe.load(tmp_path / "recipe.yaml").sparse.choose_at == (2,)
    dotted = recipe.replace(**{"sparse.carry": "hold", "policy.kv_density": 0.1})
    assert (dotted.sparse.carry, dotted.policy.kv_density) == ("hold", 0.1)
    assert Recipe.of("topk:sparse.carry=hold").sparse.carry == "hold"
    with pytest.raises(ValueError, match="carry of sparse is given twice"):
        recipe.replace(**{"sparse.carry": "hold", "carry": "off"})
    with pytest.raises(ValueError, match=r"settings of .* are .*; got 'forecast\.carry'"):
        recipe.replace(**{"forecast.carry": "hold"})
    with pytest.raises(ValueError, match="amounts need a policy"):
        Recipe.of("cached", amounts=[[0, 0.5]])
