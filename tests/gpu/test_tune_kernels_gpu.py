"""Tuning kernels on a card: the shipped configurations pass its checks, and a choice counts."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from flashomni.kernels.common import tuned
from flashomni.lab.ops.tiles import Keeper, candidates, tasks, tune
from flashomni.lab.ops.tiles_bench import GpuBench, shared_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("task", tasks(2), ids=str)
def test_shipped_configurations_pass(task):
    """In every call of the op; otherwise nothing could be compared with them."""
    bench = GpuBench(torch.device("cuda", 0), torch.bfloat16)
    shipped = bench.shipped(task)
    assert bench.wrong(task, shipped) is None
    assert bench.refused(task, shipped) is None


def test_a_choice_is_right_and_counts_at_once(monkeypatch, tmp_path):
    """GEMM-Q with heads of 64, which compiles fast."""
    device = torch.device("cuda", 0)
    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path))
    tuned.forget()
    try:
        bench, memory = GpuBench(device, torch.bfloat16), shared_memory(device)
        [task] = [task for task in tasks(2, [64]) if task.op == "gemm_q"]
        keeper = Keeper(torch.cuda.get_device_name(device), "")
        [found] = tune([task], bench, memory)
        assert found.tried > 1 and found.config in (found.shipped, *candidates(task, memory))
        keeper.keep(found)
        assert tuned.tiles(task.table, device, 64, 2) == found.config
    finally:
        tuned.forget()
