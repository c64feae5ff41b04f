"""Two ranks that share a sequence inside of the blocks: any adapter, whatever plan there is."""

import re
import types
from pathlib import Path

import diffusers
import pytest
import torch
from test_parallel import ranks  # noqa: F401  (one pair of processes for both)
from two_ranks_inside import ADAPTERS, ALONE, CASES, GRAPHS, MORE, PLANS, STEPS

from flashomni.engine import Recipe
from flashomni.engine.recipe import methods, presets
from flashomni.engine.recordable import why_not_spread
from flashomni.engine.sharding import why_not
from flashomni.engine.state.turns import why_no_turns
from flashomni.models import adapters

NAMES = [f"{name} {recipe}" for name, recipe in CASES] + ["wan", "qwen"]


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_two_ranks_compute_what_one_does(ranks, case):  # noqa: F811
    """3 heads on 2 ranks, lengths that do not divide, padding; the bits of one rank's symbols."""
    for found in ranks:
        one = found["inside"][case]
        assert one["difference"] <= 2e-6
        assert one["alike"] and one["kinds"] and one["symbols"]
        assert one["compared"] or case.endswith(("taylorseer", "columns", "balanced"))


@pytest.mark.slow
@pytest.mark.parametrize("case", NAMES)
def test_a_layer_that_is_cached_whole_communicates_nothing(ranks, case):  # noqa: F811
    """Four all-to-alls an attention that runs; SD3's first blocks have two."""
    for found in ranks:
        one = found["inside"][case]
        if case.startswith("SD3"):
            assert 4 * one["computed"] < one["exchanges"] <= 8 * one["computed"]
        elif case.endswith("hold"):  # and what it carries once a layer
            assert one["exchanges"] == 4 * one["computed"] + 4
        else:
            assert one["exchanges"] == 4 * one["computed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_diffusers_plan_is_put_aside_and_put_back(ranks, name):  # noqa: F811
    """Both orders of accelerate and enable_parallelism; without the engine it is diffusers' own."""
    for found in ranks:
        plan = found["inside"]["plans"][name]
        assert plan["alone"] and plan["stock"]
        assert plan["before"] <= 2e-6 and plan["after"] <= 2e-6
        assert plan["exchanges"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", GRAPHS)
def test_recordings_of_ranks_give_the_bits_and_count_what_they_send(ranks, recipe):  # noqa: F811
    """What is carried needs as much room on all ranks, which a refresh has to ask for."""
    for found in ranks:
        one = found["inside"]["graphs"][recipe]
        assert all(one["bits"]) and one["differ"]
        assert one["sent"] == one["replayed"]
        assert one["replays"] == (0 if recipe == "hold" else STEPS), one["notes"]


def test_why_ranks_are_not_recorded():
    cuda = torch.device("cuda")
    two = types.SimpleNamespace(device="cpu")
    assert why_not_spread(True, None, None, cuda) == ""
    assert why_not_spread(True, two, None, torch.device("cpu")) == ""
    assert "graphs=True" in why_not_spread("auto", two, None, cuda)
    assert "by way of cpu" in why_not_spread(True, two, None, cuda)
    assert "branches" in why_not_spread(True, two, two, cuda)


def test_what_the_cases_name_is_there():
    assert set(MORE) | set(PLANS) <= set(ADAPTERS)


PAGE = (Path(__file__).resolve().parents[2] / "docs/scaling.md").read_text(encoding="utf-8")


def test_a_model_runs_on_several_ranks_where_its_blocks_say_so():
    """Which models the pair of processes leaves out is what their adapters say."""
    alone = [
        name
        for name, adapter in adapters().items()
        if not all(site.sequence for site in adapter.sites(adapter.tiny()[0]))
    ]
    assert sorted(alone) == sorted(ALONE)


def test_the_page_has_a_row_for_each_model():
    """Whether ranks share it; and what becomes of diffusers' own plan."""
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:yes|no) \| [^|]+) \|$", PAGE, re.MULTILINE))
    expected = {}
    for name, adapter in adapters().items():
        plan = getattr(getattr(diffusers, name), "_cp_plan", None)
        theirs = "yes, ours in its place"
        if plan is None:
            theirs = "no plan"
        elif "parallel" in vars(type(adapter)):
            theirs = "yes"
        elif name in ALONE or set(plan.get("", ())) - {"timestep"}:
            theirs = "no"
        expected[name] = f"{'no' if name in ALONE else 'yes'} | {theirs}"
    assert rows == expected


def test_the_page_names_the_recipes_that_are_refused():
    """Of ``ulysses``, of diffusers' own plan beside those, and of ``cfg``."""
    recipes = {*presets(), *methods()}
    table = re.findall(r"^\| ([^|]+) \|", PAGE.partition("## What is refused")[2], re.MULTILINE)

    def told(start):
        rows = " ".join(row for row in table if row.startswith(start))
        return set(re.findall(r"`(\w+)`", rows)) & recipes

    def refused(why):
        return {name for name in recipes if why(Recipe.of(name))}

    inside = refused(lambda recipe: why_not(recipe, True))
    assert told("recipes ") == inside
    assert told("FLUX.1 ") == refused(lambda recipe: why_not(recipe, False)) - inside
    assert told("`cfg`: ") == refused(why_no_turns)
