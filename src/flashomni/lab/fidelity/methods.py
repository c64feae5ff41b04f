"""Ways to generate, as one word each: a recipe, a peer, or the stock pipeline with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from flashomni.engine import Recipe, StepKind, presets
from flashomni.engine.forecasts import forecasts
from flashomni.lab.fidelity.identity import foreign_code, package_versions
from flashomni.lab.fidelity.named import parse
from flashomni.lab.fidelity.peers import Peer
from flashomni.models import accelerate, transformers_of

DENSE = "dense"
STEPS = "steps="
DEFAULTS = (
    "quality", "balanced", "fast",
    "steps=20", "steps=14", "steps=10",
    "fora:interval=3", "taylorseer:interval=3", "taylorseer:interval=4", "spargeattn", "window",
    "diffusers.taylorseer:cache_interval=3", "diffusers.taylorseer:cache_interval=4",
    "diffusers.taylorseer:cache_interval=3,disable_cache_before_step=5",
    "diffusers.first_block:threshold=.1", "diffusers.first_block:threshold=.2",
    "diffusers.mag:threshold=.12", "diffusers.mag:threshold=.24", "diffusers.pab",
)  # fmt: skip
ROUNDED = "bfloat16"
FAMILIES = ("presets", "recipes", "stock", "peers")


@dataclass(frozen=True)
class Attached:
    """What a method put on a pipeline.

    Args:
        flops_skipped: read after a generation; share of the transformer blocks' FLOPs, or ``None``
            where the method does not count them itself.
        computed: likewise, steps that were not left out.
        attention_spent: likewise, attention that was computed, of dense in every step.
    """

    flops_skipped: Callable[[], float | None] = lambda: None
    computed: Callable[[], int | None] = lambda: None
    attention_spent: Callable[[], float | None] = lambda: None


Attach = Callable[[Any, int], AbstractContextManager[Attached]]
Prepare = Callable[[Any, int, Callable[[], None]], None]


@dataclass(frozen=True)
class Method:
    """One way to generate.

    Args:
        name: what the user wrote; names it in tables.
        family: one of ``FAMILIES``.
        spec: what the name stands for, JSON values; equal specs give equal pictures.
        attach: ``attach(pipe, num_steps)`` puts it on a pipeline for one generation.
        steps: denoising steps instead of the call's own.
        prepare: ``prepare(pipe, num_steps, run)``, called once for a pipeline before the first
            generation; ``run()`` generates once with whatever is attached.
        alone: whether it decides by what it sees, so that a picture of a batch is another one.
    """

    name: str
    family: str
    spec: dict[str, Any]
    attach: Attach = field(compare=False, repr=False)
    steps: int | None = None
    prepare: Prepare = field(default=lambda pipe, steps, run: None, compare=False, repr=False)
    alone: bool = False


@contextmanager
def _autocast(pipe: Any, num_steps: int) -> Iterator[Attached]:
    """Round the transformer's matrix products to bfloat16, and nothing else."""
    device = torch.device(pipe._execution_device).type
    scope = torch.autocast(device, torch.bfloat16)

    def start(*_: Any) -> None:
        scope.__enter__()

    def stop(model: Any, args: Any, output: Any) -> Any:
        scope.__exit__(None, None, None)
        return tuple(x.to(model.dtype) for x in output) if isinstance(output, tuple) else output

    handles: list[Any] = []
    for model in transformers_of(pipe).values():
        handles.append(model.register_forward_pre_hook(start))
        handles.append(model.register_forward_hook(stop, always_call=True))
    try:
        yield Attached(lambda: 0.0)
    finally:
        for handle in handles:
            handle.remove()


def parse_method(text: str, backend: str | None = None) -> Method:
    """A method as users write it.

    Args:
        text: ``steps=14``; ``bfloat16``, the stock transformer under autocast, a yardstick of what
            rounding alone does; a peer (``diffusers.taylorseer:cache_interval=4``); or what
            ``Recipe.of`` takes (``balanced``, ``fora:interval=4``, a path).
        backend: kernel backend of recipes.

    Raises:
        ValueError: it is none of these.
        NotImplementedError: a peer that is not installed, or lacks the method.
    """
    if text == ROUNDED:
        return Method(text, "stock", {"autocast": text}, _autocast)
    if text == DENSE:
        return Method(DENSE, "stock", {}, lambda pipe, steps: nullcontext(Attached()))
    if text.startswith(STEPS):
        count = text.removeprefix(STEPS)
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"steps must be a positive integer, got {text!r}")
        return Method(
            text,
            "stock",
            {"steps": int(count)},
            lambda pipe, steps: nullcontext(Attached()),
            int(count),
        )
    _, found = parse(text)  # two files may hold one name: tables here call them as they were typed
    return of_recipe(text, found, backend) if isinstance(found, Recipe) else _of_peer(text, found)


def _of_peer(name: str, peer: Peer) -> Method:
    @contextmanager
    def attach_peer(pipe: Any, num_steps: int) -> Iterator[Attached]:
        if len(transformers_of(pipe)) > 1:
            raise NotImplementedError(f"{name} is put on one transformer, and the pipeline has two")
        with peer.attached(pipe, num_steps):
            yield Attached()

    code = {**foreign_code([peer]), "packages": _versions(peer)}
    spec = {"peer": name, "code": code}
    return Method(name, "peers", spec, attach_peer, prepare=peer.prepare, alone=peer.looks)


def of_recipe(name: str, recipe: Recipe, backend: str | None = None) -> Method:
    """A recipe as a method."""

    @contextmanager
    def attach_recipe(pipe: Any, num_steps: int) -> Iterator[Attached]:
        with accelerate(pipe, recipe, backend=backend) as engine:
            yield Attached(
                lambda: engine.report().flops_skipped,
                lambda: _computed(engine.report().steps),
                lambda: engine.report().attention_spent,
            )

    family = "presets" if name in presets() else "recipes"
    spec = {
        "recipe": recipe.to_dict(),
        "backend": backend,
        "code": foreign_code([*vars(recipe).values(), forecasts().get(recipe.forecast.name)]),
    }
    late = recipe.schedule.decides or recipe.plan(1000) is None
    return Method(name, family, spec, attach_recipe, alone=late)


def _computed(steps: list[dict[str, Any]]) -> int:
    """Steps of which a call of the model was not left out."""
    return len({call["step"] for call in steps if not _left_out(call)})


def _left_out(call: dict[str, Any]) -> bool:
    """Whether it is a Dispatch that does less than all: a dense policy's does everything."""
    densities = (*call["q_density"], *call["kv_density"])
    return call["kind"] == StepKind.DISPATCH.value and any(share < 1 for share in densities)


def _versions(peer: Peer) -> list[str]:
    return [found for module in peer.modules for found in package_versions(module)]
