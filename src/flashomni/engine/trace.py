"""What a generation computed and skipped, measured as it ran; host work only when it is read."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.gains import little, nothing
from flashomni.engine.groups import Division
from flashomni.engine.recipe import Recipe
from flashomni.engine.schedules import StepKind
from flashomni.engine.state.cache import Fraction
from flashomni.util.files import write_text
from flashomni.util.stopwatch import Stopwatch
from flashomni.util.words import in_bytes

BYPASS = StepKind.BYPASS.value
OPS = ("qkv", "attention", "gemm_q", "gemm_o", "mlp")
Number = float | Tensor


@dataclass
class LayerRecord:
    """One layer in one step: what kind it was, its densities, and its ops.

    ``ops`` holds ``(op, FLOPs of the dense model, share of them executed)``; a share may be a
    scalar on the device, read when somebody asks for the summary. ``beside`` is of the layer's
    other attention, where there is one: its densities and its note; its ops are the layer's.
    ``mass`` is the share of attention mass that the visited blocks hold, ``error`` that of D (its
    norm) which the carried D missed, in refreshes that measure.
    """

    name: str
    kind: str
    q_density: Number = 1.0
    kv_density: Number = 1.0
    ops: list[tuple[str, int, Number]] = field(default_factory=list)
    note: str = ""
    mass: Number | None = None
    error: Number | None = None
    beside: LayerRecord | None = None

    def notes(self) -> list[str]:
        """What deserves attention."""
        return [each.note for each in (self, self.beside) if each is not None and each.note]

    def second(self) -> LayerRecord:
        """Of the layer's other attention."""
        self.beside = LayerRecord(self.name, self.kind, ops=self.ops)
        return self.beside

    def add(self, op: str, flops: int, share: Number = 1.0) -> None:
        """Record that ``share`` of ``flops`` was executed."""
        self.ops.append((op, flops, share))


@dataclass
class StepRecord:
    """One call of the model.

    ``kept`` is what caches hold behind it, on the compute device and in host memory, ``allocated``
    what tensors hold on a GPU; ``does`` is what it did with columns of the symbols; ``miss`` is
    what its forecasts would have been off by, read when somebody asks for the summary.
    """

    step: int
    kind: str
    branch: str
    watch: Stopwatch
    num_steps: int = 0
    layers: list[LayerRecord] = field(default_factory=list)
    kept: tuple[int, int] = (0, 0)
    allocated: int | None = None
    does: tuple[str, ...] = ()
    miss: Fraction | None = None

    def forecast_error(self) -> float | None:
        """A finite number, or ``None``; waits for the device."""
        error = math.nan if self.miss is None else self.miss.read()
        return error if math.isfinite(error) else None


@dataclass(frozen=True)
class Summary:
    """A generation in numbers; every value is JSON. ``str()`` gives a table.

    Attributes:
        model: class of the transformer.
        recipe: the recipe as a dict.
        steps: ``{step, branch, kind, seconds, q_density, kv_density, layer_kinds}`` for each call
            of the model; densities and kinds per layer, 0, 0 and "bypass" for a layer that was
            cached whole; and ``transformer``, its component, where several share a pipeline. Also
            ``executed``, the share of each layer's FLOPs, ``attention_skipped``, FLOPs of each
            layer's attention that were not executed, ``cache_bytes`` and
            ``cache_bytes_host`` behind the call, ``allocated_bytes`` of all tensors on a GPU
            (``None`` elsewhere), ``does`` ("chooses", "refreshes": what became of the columns that
            attention visits), and ``forecast_error``, the norm of what forecasts missed by that of
            what they are of, where the schedule measures it (else ``None``).
        layers: names of the layers.
        seconds_by_kind: ``{kind: {count, total, median}}``.
        flops_dense: FLOPs of the dense transformer blocks by op, over all steps.
        flops_executed: FLOPs that were executed.
        flops_skipped: 1 - executed / dense, over all ops.
        cache_bytes: peak of what the engine kept on the compute device.
        cache_bytes_host: peak of what it kept in pinned host memory.
        groups: ``{layers, schedule, forecast, computed}`` for each group of layers: their names and
            how many calls of the model computed them; empty where the recipe has no groups.
        notes: what deserves attention: a run too short to gain anything, projections that ran
            dense and why.
        tier: how much of the model is known: ``generic``, ``declared`` or ``adapter``.
        generation: how many generations there were since the engine was put on or reset. All
            figures are of the last one, also where one call of a pipeline makes several
            (``VisualClozePipeline`` two).
    """

    model: str
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    layers: list[str]
    seconds_by_kind: dict[str, dict[str, float]]
    flops_dense: dict[str, float]
    flops_executed: dict[str, float]
    flops_skipped: float
    cache_bytes: int
    cache_bytes_host: int
    notes: list[str]
    tier: str = "adapter"
    groups: list[dict[str, Any]] = field(default_factory=list)
    generation: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def attention_spent(self) -> float:
        """Attention that was computed, of dense attention in every step.

        Live block pairs, summaries, refreshes and all dense steps; 0 without attention.
        """
        dense = self.flops_dense["attention"]
        return self.flops_executed["attention"] / dense if dense else 0.0

    def save(self, path: str | Path) -> Path:
        """Write it as a text, as JSON or as a page, by the suffix; whole or not at all.

        Args:
            path: of a ``.txt``, ``.json`` or ``.html`` file. JSON has a number that is not finite
                as null.

        Returns:
            The path.

        Raises:
            ValueError: another suffix.
            OSError: it cannot be written; an older file is untouched.
        """
        path, forms = Path(path), {".txt": self._text, ".json": self._json, ".html": self._page}
        if path.suffix.lower() not in forms:
            raise ValueError(f"path must end with {', '.join(forms)}, got {str(path)!r}")
        return write_text(path, forms[path.suffix.lower()]())

    def _text(self) -> str:
        return f"{self}\n"

    def _json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def _page(self) -> str:
        from flashomni.page.parts import summary_page  # not needed to generate

        return summary_page(finite(self.to_dict()))

    def _repr_html_(self) -> str:
        """What a notebook shows of it."""
        from flashomni.page.parts import summary_fragment

        return summary_fragment(finite(self.to_dict()))

    def __str__(self) -> str:
        lines = [
            f"{self.model} (tier {self.tier}), recipe {self.recipe['name']}: "
            f"{self.flops_skipped:.1%} of the transformer blocks' FLOPs skipped, "
            f"cache {in_bytes(self.cache_bytes)}"
        ]
        if self.generation > 1:
            lines[0] = f"generation {self.generation}, the last one: {lines[0]}"
        if self.cache_bytes_host:
            lines[0] += f" and {in_bytes(self.cache_bytes_host)} in pinned host memory"
        for kind, figures in self.seconds_by_kind.items():
            lines.append(
                f"  {kind:9}{figures['count']:4.0f} calls {figures['total']:8.2f} s, "
                f"median {figures['median'] * 1e3:8.1f} ms"
            )
        for op, dense in self.flops_dense.items():
            skipped = 1 - self.flops_executed[op] / dense if dense else 0.0
            lines.append(f"  {op:9}{dense / 1e9:12.1f} GFLOP dense, {skipped:6.1%} skipped")
        each = (self.recipe, *self.recipe.values())  # itself, or one for each transformer
        if any(isinstance(r, dict) and r.get("sparse", {}).get("in_computed") for r in each):
            lines.append(f"  attention spent: {self.attention_spent:.3f} of dense in every step")
        for group in self.groups:
            names, forecast = group["layers"], group["forecast"]
            lines.append(
                f"  {names[0]} to {names[-1]} ({len(names)}): computed in {group['computed']} of "
                f"{len(self.steps)} calls, schedule {group['schedule']}, forecast {forecast}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Trace:
    """Collects the records of the last generation."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps: list[StepRecord] = []
        self.cache_bytes = self.cache_bytes_host = 0

    def begin(
        self, step: int, num_steps: int, kind: str, branch: str, device: torch.device
    ) -> StepRecord:
        record = StepRecord(step, kind, branch, Stopwatch(device), num_steps)
        self.steps.append(record)
        return record

    def ended(self, record: StepRecord, miss: Fraction | None, device: int, host: int) -> None:
        """A call is over: what forecasts missed in it, and the bytes that caches hold behind it."""
        record.kept, record.miss = (device, host), miss
        record.allocated = record.watch.allocated()
        self.cache_bytes = max(self.cache_bytes, device)
        self.cache_bytes_host = max(self.cache_bytes_host, host)

    def drop(self, record: StepRecord) -> None:
        """A call has raised."""
        self.steps = [each for each in self.steps if each is not record]

    def in_short(self) -> str:
        """One line of what is known without waiting for the device."""
        kinds = Counter(record.kind for record in self.steps)
        layers = [layer.kind for record in self.steps for layer in record.layers]
        share = layers.count(StepKind.BYPASS.value) / max(len(layers), 1)
        calls = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{calls}; {share:.0%} of the blocks cached whole"

    def of_groups(self, division: Division, names: list[str]) -> list[dict[str, Any]]:
        """:attr:`Summary.groups`.

        Args:
            division: of the model's layers into groups.
            names: of those layers.
        """
        live = (StepKind.FULL.value, StepKind.UPDATE.value)
        found = []
        for number, recipe in enumerate(division.recipes):
            own = [name for name, of in zip(names, division.of, strict=True) if of == number]
            calls = [{x.kind for x in record.layers if x.name in own} for record in self.steps]
            found.append(
                {
                    "layers": own,
                    "schedule": recipe.schedule.name,
                    "forecast": recipe.forecast.name,
                    "policy": recipe.policy.name,
                    "computed": sum(not kinds.isdisjoint(live) for kinds in calls),
                }
            )
        return found

    def summary(self, model: str, recipe: Recipe) -> Summary:
        """Read everything back. This is the only place that waits for the device."""
        dense: dict[str, float] = dict.fromkeys(OPS, 0.0)
        executed: dict[str, float] = dict.fromkeys(OPS, 0.0)
        steps: list[dict[str, Any]] = []
        notes: dict[str, None] = {}
        short = nothing(self.steps, recipe)
        if short is not None:
            notes[short] = None
        if recipe.guidance.acts and len({record.branch for record in self.steps}) == 1:
            notes["guidance: the model was called once a step, so no branch was left out"] = None
        for record in self.steps:
            shares, skipped = list[float](), list[float]()
            for layer in record.layers:
                whole = done = spared = 0.0
                for op, flops, share in layer.ops:
                    part = flops * float(share)
                    dense[op] += flops
                    executed[op] += part
                    whole, done = whole + flops, done + part
                    spared += (flops - part) * (op == "attention")
                skipped.append(spared)
                shares.append(done / whole if whole else float(layer.kind != BYPASS))
                for note in layer.notes():
                    notes[f"{layer.name}: {note}"] = None
            steps.append(
                {
                    "step": record.step,
                    "branch": record.branch,
                    "kind": record.kind,
                    "seconds": record.watch.seconds(),
                    "q_density": [float(layer.q_density) for layer in record.layers],
                    "kv_density": [float(layer.kv_density) for layer in record.layers],
                    "layer_kinds": [layer.kind for layer in record.layers],
                    "executed": shares,
                    "attention_skipped": skipped,
                    "does": list(record.does),
                    "forecast_error": record.forecast_error(),
                    "cache_bytes": record.kept[0],
                    "cache_bytes_host": record.kept[1],
                    "allocated_bytes": record.allocated,
                }
            )
        few = little(steps, recipe)
        if few is not None:
            notes[few] = None
        total = sum(dense.values())
        return Summary(
            model=model,
            recipe=recipe.to_dict(),
            steps=steps,
            layers=max(([x.name for x in r.layers] for r in self.steps), key=len, default=[]),
            seconds_by_kind=seconds_by_kind(steps),
            flops_dense=dense,
            flops_executed=executed,
            flops_skipped=1 - sum(executed.values()) / total if total else 0.0,
            cache_bytes=self.cache_bytes,
            cache_bytes_host=self.cache_bytes_host,
            notes=list(notes),
        )


def seconds_by_kind(steps: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """:attr:`Summary.seconds_by_kind` of :attr:`Summary.steps`."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        seconds[step["kind"]].append(step["seconds"])
    return {
        kind: {
            "count": len(times),
            "total": sum(times),
            "median": sorted(times)[len(times) // 2],
        }
        for kind, times in seconds.items()
    }


def finite(value: Any) -> Any:
    """JSON values with ``None`` for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
