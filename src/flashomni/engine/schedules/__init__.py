"""Schedules: which steps compute, which dispatch from the caches. One file each.

A schedule is a frozen dataclass whose fields are JSON values, registered by name. It plans all
steps before (:meth:`Schedule.plan`), or decides at the start of each step (:meth:`Schedule.kind`),
or inside a step, when the first blocks have run (:meth:`Schedule.decide`).

What a late decision costs: the host waits for the device only where the schedule reads a value of
a tensor. Those of the library read none in steps that compute anyway (the first ones, the last),
and one in a step that may be left out: the number was made by the small probe in front of it, so
the launch queue runs empty once, for as long as the probe takes. ``adaptive`` reads a number of the
step before, which is long there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from flashomni.registry import Registry
from flashomni.util.words import meant


class StepKind(Enum):
    """What a step does in every layer; ``BYPASS`` is what a layer that is cached whole does."""

    FULL = "full"
    UPDATE = "update"
    DISPATCH = "dispatch"
    BYPASS = "bypass"


@dataclass(frozen=True)
class Plan:
    """The steps of a generation.

    Args:
        kinds: of each step: full, update or dispatch.
        records: whether a full step adds its outputs to the histories.
        probes: whether a full step measures what share of the tiles the policy would compute.
        optimistic: whether a full step that records before any share is known takes it that
            layers will be cached whole.
    """

    kinds: tuple[StepKind, ...]
    records: tuple[bool, ...]
    probes: tuple[bool, ...]
    optimistic: bool = False

    @classmethod
    def of(
        cls, computed: Iterable[int], num_steps: int, order: int, optimistic: bool = False
    ) -> Plan:
        """The plan that computes these steps.

        A computed step that a Dispatch follows is an Update, any other is full. The ``order``
        computed steps before an Update record, so that its interval has all its differences. The
        probe lies two steps before the first of them, so that the host finds its number there
        without waiting.
        """
        wanted = set(computed)
        steps = range(num_steps)
        kinds = []
        for step in steps:
            is_followed = step + 1 < num_steps and step + 1 not in wanted
            live = StepKind.UPDATE if is_followed else StepKind.FULL
            kinds.append(live if step in wanted else StepKind.DISPATCH)
        ordered = sorted(wanted & set(steps))
        records = set()
        for place, step in enumerate(ordered):
            if kinds[step] is StepKind.UPDATE:
                records.update(ordered[max(place - order, 0) : place])
        first = next((step for step in steps if kinds[step] is StepKind.UPDATE), 0)
        probe = max(first - order - 2, 0)
        return cls(
            tuple(kinds),
            tuple(step in records and kinds[step] is StepKind.FULL for step in steps),
            tuple(first > 0 and step == probe for step in steps),
            optimistic,
        )

    @property
    def computed(self) -> tuple[int, ...]:
        """The steps that are not left out."""
        return tuple(s for s, kind in enumerate(self.kinds) if kind is not StepKind.DISPATCH)


@dataclass(frozen=True)
class Signals:
    """What a schedule that decides late may look at.

    Reading a value of a tensor makes the host wait for the device.

    Args:
        step: index of this step.
        num_steps: of the generation.
        computed: steps that this branch has computed so far.
        inputs: arguments of the model's call, by name (``hidden_states``, ``timestep``, ...).
        streams: the token streams in front of the layer, ``[B, R, K]`` each, inside a step.
        memory: a scratch of the schedule's own, which lives as long as the branch.
        latents: the argument that the model's output changes, any shape.
        main: which of ``streams`` holds the vision tokens.
        entrance: the streams in front of the first layer, inside a step.
        modulated: makes the first layer's input after its norm and modulation, ``[B, R, K]``; in
            front of that layer, where the adapter knows how.
        error: reads how far the forecasts were off at the last Update: norm of the error over the
            norm of the value, over all layers that are cached whole (or the output), the worst
            branch; ``None`` before there is one, or where ``measures`` is not set.
    """

    step: int
    num_steps: int
    computed: tuple[int, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    streams: tuple[Tensor, ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    latents: Tensor | None = None
    main: int = 0
    entrance: tuple[Tensor, ...] = ()
    modulated: Callable[[], Tensor] | None = None
    error: Callable[[], float] | None = None


class Schedule:
    """Base of all schedules: a frozen dataclass whose fields are JSON values.

    Attributes:
        front: layers that are computed in every step, by schedules that decide inside a step.
        back: likewise, at the end.
        decides: whether :meth:`decide` is asked, and :meth:`watch` told.
        learns: whether :meth:`learn` is told.
        measures: whether the error of the forecasts is measured at Updates.
        modulates: whether it needs ``Signals.modulated``.
    """

    name: ClassVar[str]
    decides: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    modulates: ClassVar[bool] = False
    front: int = 0
    back: int = 0

    def plan(self, num_steps: int, order: int) -> Plan | None:
        """All steps of a generation, or ``None`` if they are decided one by one.

        Args:
            num_steps: at least 1.
            order: forecast order.
        """
        return None

    def kind(self, step: int, num_steps: int, signals: Signals) -> StepKind:
        """What this step does; asked at its first call, where :meth:`plan` says nothing.

        The step's other calls (other branches) do the same, with what is said inside the step too.
        """
        raise TypeError(f"schedule {type(self).__name__} implements neither plan nor kind")

    def decide(self, layer: int, signals: Signals) -> bool:
        """Whether the rest of this Dispatch step is computed after all.

        Asked once a step, in front of layer ``front``; if not, all layers but the ``back`` last
        come from the cache.
        """
        raise TypeError(f"schedule {type(self).__name__} does not implement decide")

    def watch(self, layer: int, signals: Signals) -> None:
        """What :meth:`decide` would have seen, in a step that computes anyway. Read no value."""

    def learn(self, output: Tensor, signals: Signals) -> None:
        """What the model returned in a step that computed (its first tensor). Read no value."""

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., field: value}``, all JSON values.

        Raises:
            ValueError: the class has no name of its own.
        """
        if "name" not in vars(type(self)):
            raise ValueError(
                f"{type(self).__qualname__} is not registered: put @schedule(name) above "
                "@dataclass(frozen=True)"
            )
        values = {f.name: getattr(self, f.name) for f in fields(type(self))}
        lists = {k: list(v) for k, v in values.items() if isinstance(v, tuple)}
        return {"name": self.name, **values, **lists}


def fields(cls: type[Schedule]) -> tuple[dataclasses.Field, ...]:
    """The settings of a schedule class."""
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every schedule is a dataclass


SCHEDULES: Registry[type[Schedule]] = Registry("schedule", __name__, "flashomni.schedules")


def schedule(name: str) -> Callable[[type[Schedule]], type[Schedule]]:
    """Register a schedule class as ``name``; put it above ``@dataclass(frozen=True)``."""

    def register(cls: type[Schedule]) -> type[Schedule]:
        parameters = vars(cls).get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            raise TypeError(
                f"schedule {cls.__name__} must be a frozen dataclass: "
                f'put @schedule("{name}") above @dataclass(frozen=True)'
            )
        SCHEDULES.add(name, cls)
        cls.name = name
        return cls

    return register


def schedules() -> dict[str, type[Schedule]]:
    """Every schedule class by name."""
    return SCHEDULES.all()


def make_schedule(name: str, **settings: Any) -> Schedule:
    """The schedule ``name`` with these settings.

    Raises:
        ValueError: no such schedule, no such setting, or a value that is not allowed.
    """
    cls = SCHEDULES.get(name)
    allowed = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in allowed:
            takes = ", ".join(allowed) or "no settings"
            near = meant(setting, allowed)
            raise ValueError(f"schedule {name} takes {takes}, got {setting!r}{near}")
    lists = {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
    return cls(**{**settings, **lists})
