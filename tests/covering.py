"""Cases in which few parameters meet at a time, instead of a whole product of them.

``@pytest.mark.covering(2)`` on a test whose parameters are independent: of its cases those stay in
which each two values that could meet still do (pairwise testing; Cohen et al., *The AETG system*,
IEEE TSE 1997, for the greedy choice). ``covering(1)``: each value is tried once. What is ragged,
and each backend, adapter and schedule, stays a value; only their combinations get fewer. Cases that
need a GPU, or Triton, are chosen apart from the others, so that each sort covers; a case that is
refused where the tests run would cover nothing, and is left out.
"""

from collections import Counter
from itertools import combinations

APART = ("gpu", "triton", "slow")


def covering(cases, strength):
    """Indices of the cases that stay, in order.

    Args:
        cases: of each the parameters by name, hashable.
        strength: how many values must meet wherever they can.
    """
    tuples = [set(combinations(sorted(case.items()), strength)) for case in cases]
    missing, used = set().union(*tuples), Counter()
    chosen = []
    while missing:
        # Most that is new; among those the values that came least, then the first case.
        best = max(
            range(len(cases)),
            key=lambda i: (len(tuples[i] & missing), -sum(used[x] for x in cases[i].items()), -i),
        )
        chosen.append(best)
        missing -= tuples[best]
        used.update(cases[best].items())
    return sorted(chosen)


def covered(items, is_refused):
    """Of collected tests those that stay.

    Args:
        items: what was collected.
        is_refused: whether a case cannot run here, by its parameters and marks.
    """
    groups, stay = {}, set()
    for item in items:
        marker = item.get_closest_marker("covering")
        if marker is None:
            stay.add(item)
            continue
        if is_refused(item):
            continue
        where = frozenset(mark.name for mark in item.iter_markers() if mark.name in APART)
        key = item.nodeid.partition("[")[0], marker.args, where
        groups.setdefault(key, []).append(item)
    for (_, (strength,), _), some in groups.items():
        # The same object in each case: values themselves may not be hashable.
        cases = [{name: id(x) for name, x in item.callspec.params.items()} for item in some]
        chosen = covering(cases, strength)
        stay.update(some[index] for index in chosen)
    return [item for item in items if item in stay]
