"""Branches of true CFG on two ranks at once, and who is with whom on more of them."""

import re

import pytest
import torch.distributed as dist
from test_parallel import ranks  # noqa: F401  (one pair of processes for all)
from two_ranks_cfg import BRANCHES, RECIPES, STEPS

from flashomni.parallel import Mesh


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_guide_as_one_does(ranks, name):  # noqa: F811
    """Bit for bit, in all steps: a branch is one rank's alone, in the way that it goes on one."""
    for found in ranks:
        assert found["cfg"][name]["equal"] and found["cfg"][name]["kinds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_each_rank_runs_its_branch(ranks, name):  # noqa: F811
    """After a step that both run whole; then each output crosses once, and nothing else does."""
    for rank, found in enumerate(ranks):
        one, own = found["cfg"][name], BRANCHES[rank]
        first = [[0, branch] for branch in BRANCHES]
        assert one["here"] == [*first, *([step, own] for step in range(1, STEPS))]
        assert one["broadcasts"] == 2 * (STEPS - 1) and one["exchanges"] == 0
        assert one["bytes"] == (STEPS - 1) * one["output"]


REFUSED = {
    "ends": "RuntimeError: .*called for cond in one step and for cond, uncond in the first",
    "begins": "RuntimeError: .*called for cond, uncond in one step and for cond in the first",
    "turns": "RuntimeError: .*called for uncond in one step.*guidance that changes.*needs cfg=1",
    "noise": r"ValueError: hidden_states .*generator=torch.Generator\('cpu'\)",
    "schedule": "NotImplementedError: cfg is not supported with easycache: schedule",
    "guidance": "NotImplementedError: cfg is not supported .*one branch of the other",
    "memory": "NotImplementedError: memory is not supported on several ranks",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_on_both_ranks(ranks, what):  # noqa: F811
    """Guidance that changes from step to step above all: a branch would be nobody's."""
    for found in ranks:
        message = found["cfg"]["refusals"][what]
        assert re.match(REFUSED[what], message), message


@pytest.mark.slow
def test_one_call_a_step_is_told(ranks):  # noqa: F811
    for found in ranks:
        notes = found["cfg"]["refusals"]["notes"]
        assert any("called once a step, so nothing was shared out" in note for note in notes)


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize(("ulysses", "cfg"), [(3, 2), (2, 3), (6, 1), (1, 6)])
def test_neighbours_share_a_sequence_and_columns_the_branches(ulysses, cfg, rank):
    """Of six ranks, none of which there has to be."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
    try:
        mesh = Mesh.of(ulysses, cfg)
        members = [
            [rank] if one is None else dist.get_process_group_ranks(one.group)
            for one in (mesh.ulysses, mesh.cfg)
        ]
        assert members[0] == [r for r in range(6) if r // ulysses == rank // ulysses]
        assert members[1] == [r for r in range(6) if r % ulysses == rank % ulysses]
        for one, group in zip((mesh.ulysses, mesh.cfg), members, strict=True):
            assert one is None or (one.rank, one.size) == (group.index(rank), len(group))
    finally:
        dist.destroy_process_group()
