"""Two ranks that share a sequence inside of the blocks: any adapter, whatever plan there is."""

import pytest
from test_parallel import ranks  # noqa: F401  (one pair of processes for both)
from two_ranks_inside import ADAPTERS, CASES, MORE, PLANS

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


def test_what_the_cases_name_is_there():
    assert set(MORE) | set(PLANS) <= set(ADAPTERS)
