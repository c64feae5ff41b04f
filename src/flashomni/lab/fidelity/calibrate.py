"""What ``magcache`` and ``teacache`` take from a dense run of the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashomni.lab.generation import Generation
from flashomni.models import find_adapter


def calibrate(job: Generation) -> dict[str, dict[str, list[float]]]:
    """Settings of ``magcache`` and ``teacache`` that one dense run gives.

    The ratio of a step is the mean of ``|added| / |added before|`` over tokens (norms over
    channels) of what the blocks add to the vision tokens; the polynomial of degree 4 takes the
    relative change of the first block's modulated input to that of the output.
    """
    model = job.pipe.transformer
    with recorded(model) as seen:
        job.run(lambda *_: None)
    added, modulated, outputs = seen["added"], seen["modulated"], seen["outputs"]
    norms = [each.norm(dim=-1) for each in added]
    ratios = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(norms)]
    found = {"magcache": {"ratios": [round(ratio, 5) for ratio in ratios]}}
    if modulated:
        x, y = (
            torch.tensor([float(_change(b, a)) for a, b in itertools.pairwise(each)])
            for each in (modulated, outputs)
        )
        powers = torch.stack([x.double() ** n for n in range(4, -1, -1)], dim=1)
        fit = torch.linalg.lstsq(powers, y.double()[:, None]).solution[:, 0]
        found["teacache"] = {"coefficients": [float(f"{c:.6g}") for c in fit]}
    return found


def _change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new - old).abs().mean() / old.abs().mean()


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the blocks add, the first one's modulated input and the output, of each call."""
    sites = find_adapter(model).sites(model)
    first, last = sites[0], sites[-1]
    seen: dict[str, list[torch.Tensor]] = {"added": [], "modulated": [], "outputs": []}
    entrance: list[torch.Tensor] = []

    def before(block: Any, args: tuple, kwargs: dict) -> None:
        entrance[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]
        if first.modulated is not None:
            seen["modulated"].append(first.modulated(block, *args, **kwargs).float().cpu())

    def behind(block: Any, args: tuple, output: Any) -> None:
        seen["added"].append((last.unpack(output)[last.main] - entrance[0]).float().cpu())

    def returned(module: Any, args: tuple, output: Any) -> None:
        seen["outputs"].append((output[0] if isinstance(output, tuple) else output).float().cpu())

    handles = [
        first.block.register_forward_pre_hook(before, with_kwargs=True),
        last.block.register_forward_hook(behind),
        model.register_forward_hook(returned),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
