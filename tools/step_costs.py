"""Where the time of a step goes: its kernels, how many there are, and the host that launches them.

``python tools/step_costs.py ltx flux`` on a card: the cases and recipes of ``tools/tiers.py``, with
the adapter. Each step from an idle device to an idle device, so a step whose host takes as long as
the step itself is limited by it; then the same as CUDA graphs. ``--device cpu`` is a try on small
models, where the profiler counts torch's ops.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tier.cases import CASES, Inputs
from tiers import RECIPES, made
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import flashomni
from flashomni.models import adapters
from flashomni.util.files import write_text

HEAD = "| recipe | steps | step | host | kernels | launches | as CUDA graphs |\n" + "|---" * 7 + "|"
Around = Callable[[int, Callable[[], None]], None]


class Took(NamedTuple):
    """Milliseconds of a step: until the host had launched it, and until the device had run it."""

    host: float
    wall: float


def generation(model: nn.Module, given: Inputs, steps: int, engine: Any, around: Around) -> None:
    """A plain loop over the model, each of its steps run by ``around``."""
    cls = adapters()[type(model).__name__]
    x, time_of = given[cls.latents].clone(), "timestep" if "timestep" in given else "t"

    def call(step: int) -> None:
        at = {cls.latents: x, time_of: given[time_of] * (1 - step / steps)}
        out = model(**{**given, **at}, return_dict=False)[0]
        out = torch.stack(out) if isinstance(out, list) else out
        x[tuple(slice(0, size) for size in out.shape)] -= out / steps

    for step in range(steps):
        if engine is not None:
            engine.step(step, steps)
        around(step, lambda step=step: call(step))  # type: ignore[misc]


def clocked(device: torch.device, took: list[Took]) -> Around:
    """Runs a step, and notes what it took."""
    waits = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def around(step: int, run: Callable[[], None]) -> None:
        waits()
        start = time.perf_counter()
        run()
        launched = time.perf_counter()
        waits()
        took.append(Took(1e3 * (launched - start), 1e3 * (time.perf_counter() - start)))

    return around


def profiled(device: torch.device, wanted: set[int], found: dict[int, Any]) -> Around:
    """Runs a step; of those that are wanted it notes the milliseconds of kernels, and their number.

    By name, those that take longest first.
    """
    on_card = device.type == "cuda"
    kind = ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU

    def around(step: int, run: Callable[[], None]) -> None:
        if step not in wanted:
            return run()
        with profile(activities=[kind]) as seen:
            run()
            if on_card:
                torch.cuda.synchronize()
        names: dict[str, list[float]] = defaultdict(list)
        for event in seen.events():
            if not on_card:
                names[event.name].append(event.self_cpu_time_total / 1e3)
            elif event.device_type == DeviceType.CUDA:
                names[event.name].append(event.device_time / 1e3)
        found[step] = dict(sorted(names.items(), key=lambda each: -sum(each[1])))

    return around


def rows(model: nn.Module, given: Inputs, recipe: str, steps: int) -> Iterator[tuple[str, Any]]:
    """Lines of the table, one for each kind of step, and its kernels."""
    device = next(model.parameters()).device
    plain, graphed, found = list[Took](), list[Took](), dict[int, Any]()
    with flashomni.accelerate(model, RECIPES[recipe], graphs=False) as engine:
        generation(model, given, steps, engine, lambda _, run: run())
        generation(model, given, steps, engine, clocked(device, plain))
        kinds = [step["kind"] for step in engine.report().steps]
        wanted = {len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds}
        generation(model, given, steps, engine, profiled(device, wanted, found))
    with flashomni.accelerate(model, RECIPES[recipe], graphs=True) as engine:
        for _ in range(3):
            generation(model, given, steps, engine, lambda _, run: run())
        generation(model, given, steps, engine, clocked(device, graphed))
        notes = [note for note in engine.report().notes if "CUDA graphs" in note]
    for kind in dict.fromkeys(kinds):
        own = [place for place, each in enumerate(kinds) if each == kind]
        kernels = found[max(own)]
        wall, host, again = (
            f"{statistics.median(values):.1f}"
            for values in zip(*((*plain[i][::-1], graphed[i].wall) for i in own), strict=True)
        )
        spent = sum(sum(times) for times in kernels.values())
        count = sum(len(times) for times in kernels.values())
        line = f"{len(own)} {kind} | {wall} | {host} | {spent:.1f} | {count:,} | {again}"
        yield f"| `{RECIPES[recipe]}` | {line} |", kernels
    mean = [statistics.fmean(each.wall for each in took) for took in (plain, graphed)]
    yield f"mean {mean[0]:.1f} ms, as graphs {mean[1]:.1f} ms; {'; '.join(notes)}", {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=CASES)
    parser.add_argument("--recipes", nargs="+", default=["lossless", "topk"], choices=RECIPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kernels", type=Path, help="a file for the kernels, by name")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    device, named = torch.device(args.device), list[str]()
    for case in args.models:
        name, (_, model), given = made(case, device)
        stock = list[Took]()
        generation(model, given, args.steps, None, lambda _, run: run())
        generation(model, given, args.steps, None, clocked(device, stock))
        wall, host = (statistics.median(getattr(x, n) for x in stock) for n in ("wall", "host"))
        where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        print(f"{name}, {where}: stock {wall:.1f} ms, host {host:.1f} ms\n\n{HEAD}", flush=True)
        for recipe in args.recipes:
            for line, kernels in rows(model, given, recipe, args.steps):
                print(line, flush=True)
                named += [line, *(map(_line, kernels.items()))]
    if args.kernels is not None:
        write_text(args.kernels, "\n".join([*named, ""]))


def _line(kernel: tuple[str, list[float]]) -> str:
    name, times = kernel
    return f"{sum(times):9.3f} ms {len(times):5} x {name}"


if __name__ == "__main__":
    main()
