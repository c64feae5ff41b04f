"""What ``magcache`` and ``teacache`` take from a dense run of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.clock import Clock
from flashomni.lab.generation import Generation
from flashomni.models import find_adapter

Seen = dict[str, Tensor]  # what one call of the model showed, on the host


def calibrate(job: Generation) -> dict[str, dict[str, list[float]]]:
    """Settings of ``magcache`` and ``teacache`` that one dense run gives.

    The ratio of a step is the mean of ``|added| / |added before|`` over tokens (norms over
    channels) of what the blocks add to the vision tokens; the polynomial of degree 4 takes the
    relative change of the first block's modulated input to that of the output. Where guidance makes
    several calls a step, each is followed by itself: ratios are their mean, as one decision is for
    all of them, and the polynomial is fitted to the changes of all.

    Raises:
        NotImplementedError: the pipeline has two transformers, which share its steps.
    """
    if isinstance(getattr(job.pipe, "transformer_2", None), torch.nn.Module):
        raise NotImplementedError(
            f"{type(job.pipe).__name__} has a transformer and a transformer_2 that share its "
            "steps: one is calibrated at a time, on a pipeline of its own"
        )
    with recorded(job.pipe.transformer, job.pipe) as steps:
        job.run(lambda *_: None)
    pairs = [_follows(now, before) for before, now in itertools.pairwise(steps)]
    ratios = [1.0] + [
        sum(float(_ratio(now["added"], then["added"])) for now, then in pair) / len(pair)
        for pair in pairs
    ]
    found = {"magcache": {"ratios": [round(ratio, 5) for ratio in ratios]}}
    changes = [pair for some in pairs for pair in some]
    if all("modulated" in call for step in steps for call in step):
        x, y = (
            torch.tensor([float(_change(now[name], then[name])) for now, then in changes])
            for name in ("modulated", "output")
        )
        powers = torch.stack([x.double() ** n for n in range(4, -1, -1)], dim=1)
        fit = torch.linalg.lstsq(powers, y.double()[:, None]).solution[:, 0]
        found["teacache"] = {"coefficients": [float(f"{c:.6g}") for c in fit]}
    return found


def _follows(now: list[Seen], before: list[Seen]) -> list[tuple[Seen, Seen]]:
    """Each call of a step with the same call of the step before: guidance may end between them."""
    return list(zip(now, before, strict=False))


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    return (new.norm(dim=-1) / old.norm(dim=-1)).mean()


def _change(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).abs().mean() / old.abs().mean()


@contextmanager
def recorded(model: Any, pipe: Any) -> Iterator[list[list[Seen]]]:
    """What each call of each step shows, step by step: ``added`` is what the blocks add,
    ``modulated`` the first one's modulated input where an adapter knows it, and ``output``.
    """
    sites = find_adapter(model).sites(model)
    first, last = sites[0], sites[-1]
    steps: list[list[Seen]] = []
    at: list[int] = []  # the pipeline's count of the last step seen
    entrance: list[Tensor] = []
    clock = Clock(model, pipe)

    def begins(module: Any, args: tuple) -> None:
        position = clock.locate(None)
        assert position is not None, "the pipeline calls its model within its steps"
        if [position.index] != at:
            at[:] = [position.index]
            steps.append([])
        steps[-1].append({})

    def before(block: Any, args: tuple, kwargs: dict) -> None:
        entrance[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]
        if first.modulated is not None:
            modulated = first.modulated(block, *args, **kwargs)
            steps[-1][-1]["modulated"] = modulated.float().cpu()

    def behind(block: Any, args: tuple, output: Any) -> None:
        added = last.unpack(output)[last.main] - entrance[0]
        steps[-1][-1]["added"] = added.float().cpu()

    def returned(module: Any, args: tuple, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        steps[-1][-1]["output"] = found.float().cpu()

    handles = [
        model.register_forward_pre_hook(begins),
        first.block.register_forward_pre_hook(before, with_kwargs=True),
        last.block.register_forward_hook(behind),
        model.register_forward_hook(returned),
    ]
    try:
        yield steps
    finally:
        clock.remove()
        for handle in handles:
            handle.remove()
