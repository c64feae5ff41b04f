"""What a generation computed and skipped, measured as it ran; host work only when it is read."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

OPS = ("qkv", "attention", "gemm_q", "gemm_o", "mlp")
Number = float | Tensor


@dataclass
class LayerRecord:
    """One layer in one step: what kind it was, its densities, and its ops.

    ``ops`` holds ``(op, FLOPs of the dense model, share of them executed)``; a share may be a
    scalar on the device, read when somebody asks for the summary.
    """

    name: str
    kind: str
    q_density: Number = 1.0
    kv_density: Number = 1.0
    ops: list[tuple[str, int, Number]] = field(default_factory=list)
    note: str = ""

    def add(self, op: str, flops: int, share: Number = 1.0) -> None:
        """Record that ``share`` of ``flops`` was executed."""
        self.ops.append((op, flops, share))


class Stopwatch:
    """Seconds between start and stop; on CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start, self._stop = self._now(), None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float:
        if self._stop is None:
            return float("nan")
        if not self._cuda:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3


@dataclass
class StepRecord:
    """One call of the model."""

    step: int
    kind: str
    branch: str
    watch: Stopwatch
    layers: list[LayerRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """A generation in numbers; every value is JSON. ``str()`` gives a table.

    Attributes:
        model: class of the transformer.
        recipe: the recipe as a dict.
        steps: ``{step, branch, kind, seconds, q_density, kv_density}`` for each call of the model;
            densities per layer, 0 and 0 for a layer that was cached whole.
        layers: names of the layers.
        seconds_by_kind: ``{kind: {count, total, median}}``.
        flops_dense: FLOPs of the dense transformer blocks by op, over all steps.
        flops_executed: FLOPs that were executed.
        flops_skipped: 1 - executed / dense, over all ops.
        cache_bytes: peak of what the engine kept on the compute device.
        cache_bytes_host: peak of what it kept in pinned host memory.
        notes: projections that ran dense, and why.
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}, recipe {self.recipe['name']}: {self.flops_skipped:.1%} of the "
            f"transformer blocks' FLOPs skipped, cache {self.cache_bytes / 2**20:.1f} MiB"
        ]
        if self.cache_bytes_host:
            lines[0] += f" and {self.cache_bytes_host / 2**20:.1f} MiB in pinned host memory"
        for kind, figures in self.seconds_by_kind.items():
            lines.append(
                f"  {kind:9}{figures['count']:4.0f} calls {figures['total']:8.2f} s, "
                f"median {figures['median'] * 1e3:8.1f} ms"
            )
        for op, dense in self.flops_dense.items():
            skipped = 1 - self.flops_executed[op] / dense if dense else 0.0
            lines.append(f"  {op:9}{dense / 1e9:12.1f} GFLOP dense, {skipped:6.1%} skipped")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


class Trace:
    """Collects the records of the last generation."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.steps: list[StepRecord] = []
        self.cache_bytes = self.cache_bytes_host = 0

    def begin(self, step: int, kind: str, branch: str, device: torch.device) -> StepRecord:
        record = StepRecord(step, kind, branch, Stopwatch(device))
        self.steps.append(record)
        return record

    def saw_bytes(self, device: int, host: int) -> None:
        self.cache_bytes = max(self.cache_bytes, device)
        self.cache_bytes_host = max(self.cache_bytes_host, host)

    def summary(self, model: str, recipe: dict[str, Any]) -> Summary:
        """Read everything back. This is the only place that waits for the device."""
        dense: dict[str, float] = dict.fromkeys(OPS, 0.0)
        executed: dict[str, float] = dict.fromkeys(OPS, 0.0)
        steps, seconds = [], defaultdict(list)
        notes: dict[str, None] = {}
        for record in self.steps:
            elapsed = record.watch.seconds()
            seconds[record.kind].append(elapsed)
            for layer in record.layers:
                for op, flops, share in layer.ops:
                    dense[op] += flops
                    executed[op] += flops * float(share)
                if layer.note:
                    notes[f"{layer.name}: {layer.note}"] = None
            steps.append(
                {
                    "step": record.step,
                    "branch": record.branch,
                    "kind": record.kind,
                    "seconds": elapsed,
                    "q_density": [float(layer.q_density) for layer in record.layers],
                    "kv_density": [float(layer.kv_density) for layer in record.layers],
                    "layer_kinds": [layer.kind for layer in record.layers],
                }
            )
        total = sum(dense.values())
        return Summary(
            model=model,
            recipe=recipe,
            steps=steps,
            layers=[layer.name for layer in self.steps[0].layers] if self.steps else [],
            seconds_by_kind={
                kind: {
                    "count": len(times),
                    "total": sum(times),
                    "median": sorted(times)[len(times) // 2],
                }
                for kind, times in seconds.items()
            },
            flops_dense=dense,
            flops_executed=executed,
            flops_skipped=1 - sum(executed.values()) / total if total else 0.0,
            cache_bytes=self.cache_bytes,
            cache_bytes_host=self.cache_bytes_host,
            notes=list(notes),
        )
