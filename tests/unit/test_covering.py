"""Which cases of a product are run: values meet, and none that is refused stands for another."""

import itertools
from types import SimpleNamespace

import pytest

from covering import covered, covering

SIZES = {"shape": 5, "dtype": 3, "backend": 2}
CASES = [
    dict(zip(SIZES, values, strict=True))
    for values in itertools.product(*map(range, SIZES.values()))
]


def pairs(cases, strength):
    return {
        tuple((name, case[name]) for name in names)
        for case in cases
        for names in itertools.combinations(SIZES, strength)
    }


@pytest.mark.parametrize(("strength", "most"), [(1, 5), (2, 17), (3, 30)])
def test_whatever_can_meet_meets(strength, most):
    """In few cases: the largest product of so many parameters is the least there can be."""
    chosen = [CASES[index] for index in covering(CASES, strength)]
    assert pairs(chosen, strength) == pairs(CASES, strength)
    assert len(chosen) <= most


class Item:
    """A collected test as far as `covered` looks at it."""

    def __init__(self, case, marks):
        self.nodeid, self.marks = f"test_x.py::test_y[{case}]", marks
        self.callspec = SimpleNamespace(params=case)

    def get_closest_marker(self, name):
        return SimpleNamespace(args=(1,))

    def iter_markers(self):
        return [SimpleNamespace(name=name) for name in self.marks]


def chosen_of(cases, is_refused=lambda item: False, marks=lambda case: ()):
    items = [Item(case, marks(case)) for case in cases]
    return [each.callspec.params for each in covered(items, is_refused)]


def test_refused_cases_cover_nothing():
    """Each shape is tried in a dtype that runs, and none in the one that does not."""
    found = chosen_of(CASES, lambda item: item.callspec.params["dtype"] == 1)
    assert {case["shape"] for case in found} == set(range(SIZES["shape"]))
    assert {case["dtype"] for case in found} == {0, 2}


def test_sorts_are_chosen_apart():
    """Where there is no GPU the other cases still cover."""
    found = chosen_of(CASES, marks=lambda case: ("gpu",) if case["backend"] else ())
    for backend in range(SIZES["backend"]):
        here = [case for case in found if case["backend"] == backend]
        assert {case["shape"] for case in here} == set(range(SIZES["shape"]))
        assert {case["dtype"] for case in here} == set(range(SIZES["dtype"]))
