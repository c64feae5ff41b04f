"""What all layers share in one call of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.geometry import Geometry
from flashomni.engine.noise import Noise
from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules import Plan, StepKind
from flashomni.engine.sparse_settings import Marks, SparseStep
from flashomni.engine.state.room import Room
from flashomni.engine.state.storage import Storage
from flashomni.engine.symbols_file import SymbolsFile
from flashomni.parallel import Shard
from flashomni.symbols import Grid

Wanted = tuple[str, tuple[int, ...], bool]


@dataclass
class StepPlan:
    """What all layers share in one call of the model.

    Args:
        kind: full, update or dispatch.
        step: index of this step, of ``num_steps``.
        num_steps: of the generation.
        branch: name of the conditioning branch.
        records: whether a full step adds its outputs to the histories.
        probes: whether a full step measures the fraction for S_q.
        optimistic: whether a full step that records before any fraction is known takes it that
            layers will be cached whole.
        progress: fp32 scalar (step + 1) / num_steps.
        recipe: what to compute and what to cache.
        storage: how histories and bias terms of tiles are kept.
        backend: take exactly this one in every op; ``None`` takes the best that accepts.
        device: where the model computes.
        num_layers: of the model.
        grids: makes the grid of a sequence, or finds it (see :class:`Grids`).
        redone: memory of what attention did again, of each layer; empty where nothing anchors.
        geometry: where the vision tokens lie; ``None`` where the policy does not look at it.
        inputs: the model's arguments by name.
        room: where D is kept; ``None`` where nobody asked.
        symbols: what is used instead of a choice.
        shard: how the sequence is spread over ranks; ``None`` on one card.
        marks: what was done with the columns of the symbols before this step.
        computed: steps that are computed, all of them; none where that is decided late.
        noise: of the generation's steps, if a forecast asks for it.
        numbers: the coefficients that were asked for so far, by what they are for.
    """

    kind: StepKind
    step: int
    num_steps: int
    branch: str
    records: bool
    probes: bool
    optimistic: bool
    progress: Tensor
    recipe: Recipe
    storage: Storage
    backend: str | None
    device: torch.device
    num_layers: int
    grids: Callable[..., Grid]
    redone: tuple[Tensor, ...] = ()
    geometry: Geometry | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    room: Room | None = None
    symbols: SymbolsFile | None = None
    shard: Shard | None = None
    marks: Marks = field(default_factory=Marks)
    computed: tuple[int, ...] = ()
    noise: Noise | None = None
    numbers: dict[Wanted, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        planned: Plan | None,
        kind: StepKind,
        step: int,
        num_steps: int,
        branch: str,
        *,
        device: torch.device,
        **shared: Any,
    ) -> StepPlan:
        """The plan of a group of layers.

        Args:
            recipe: that the group follows.
            planned: its steps, where the schedule knows them before.
            kind: what it does in this one.
            step: index.
            num_steps: of the generation.
            branch: name.
            device: where the model computes.
            shared: what all groups share.
        """
        at_output = recipe.at_output
        return cls(
            kind=kind,
            step=step,
            num_steps=num_steps,
            branch=branch,
            records=planned is None or planned.records[step],
            probes=planned is not None and planned.probes[step] and not at_output,
            optimistic=planned is None or planned.optimistic,
            computed=() if planned is None else planned.computed,
            progress=torch.full((), (step + 1) / num_steps, device=device),
            recipe=recipe,
            device=device,
            **shared,
        )

    @property
    def sparse(self) -> SparseStep:
        """What the step does with the columns of the symbols."""
        ends = self.kind is StepKind.FULL and self.step == self.num_steps - 1
        if ends and not self.recipe.sparse.in_computed:  # dense, and no step is left to use them
            return SparseStep()
        carries = self.room is None or self.room.has(self.branch)
        return self.recipe.sparse.step(self.kind, self.step, self.marks, carries)

    @property
    def stores(self) -> bool:
        """Whether this step adds to the histories."""
        return self.kind is StepKind.UPDATE or (self.kind is StepKind.FULL and self.records)

    @property
    def hopeful(self) -> bool:
        """Whether layers of which nothing is known yet are taken to be cached whole."""
        return self.optimistic and self.kind is StepKind.FULL

    def coefficients(self, times: tuple[int, ...], halved: bool = False) -> Tensor:
        """Weights of the terms of a history with these anchors, at this step: fp32, on the device.

        Layers whose history began later have fewer anchors; most layers share one tensor.

        Args:
            times: the anchors.
            halved: for terms that a history of that name keeps of fp16 values.
        """
        return self.weights(("forecast", times, halved))

    def carried(self, times: tuple[int, ...], halved: bool = False) -> Tensor:
        """Weights of D and of its last change, of refreshes at these steps; see above."""
        return self.weights(("carry", times, halved))

    def weights(self, wanted: Wanted) -> Tensor:
        """Coefficients by what they are for, their anchors, and whether terms are halved."""
        if wanted not in self.numbers:
            rule, times, halved = wanted
            if rule == "carry":
                share = self.recipe.sparse.extrapolation
                values = (1.0, share * (self.step - times[-1]))[: len(times)]
            else:
                at = (times, self.step, self.num_steps)
                values = self.recipe.forecast.coefficients(*at, self.computed, self.noise)
            values = tuple(x * 2**i for i, x in enumerate(values)) if halved else values
            self.numbers[wanted] = _to_device(values, self.device)
        return self.numbers[wanted]


def _to_device(values: Sequence[float], device: torch.device) -> Tensor:
    """A small fp32 tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)
