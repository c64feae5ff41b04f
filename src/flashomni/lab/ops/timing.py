"""Clocks: wall time on a CPU; on a GPU CUDA graphs over rotating inputs, in turns, medians.

A run is a function of a number that says which of several sets of inputs to take, so that the L2
cache of a GPU does not hold what a model would have to fetch.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[int], Any]
GRAPH_MS = 8.0  # of one sample on a GPU


def interleaved(
    runs: Mapping[str, Run], device: torch.device, rounds: int, sets: int
) -> dict[str, float]:
    """Median milliseconds of each run; they take turns, so that a drifting machine hits all.

    Args:
        runs: name -> run; on a GPU it must not wait for the device, it is captured in a graph.
        device: where they run.
        rounds: samples of each.
        sets: how many sets of inputs a run takes in turn.
    """
    samples = {name: _sampler(run, device, sets) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(samples), len(samples)):
            taken = samples[name]()
            if number or device.type != "cuda":  # the first round warms the card
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def _sampler(run: Run, device: torch.device, sets: int) -> Callable[[], float]:
    """What takes one sample: milliseconds of one call."""
    if device.type == "cuda":
        return _graph_sampler(run, sets)

    def sample() -> float:
        start = time.perf_counter()
        run(0)
        return (time.perf_counter() - start) * 1e3

    run(0)
    return sample


def _graph_sampler(run: Run, sets: int) -> Callable[[], float]:
    for i in range(sets):  # compile, and fill the caches of the libraries
        run(i)
    torch.cuda.synchronize()
    once = _elapsed(lambda: [run(i) for i in range(sets)]) / sets
    calls = sets * max(1, round(GRAPH_MS / max(once, 0.01) / sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % sets)
    return lambda: _elapsed(graph.replay) / calls


def _elapsed(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
