"""Symbols in safetensors: what was chosen in one generation, to be used in others or studied.

Tensors are named ``BRANCH/LAYER/q_bits`` (uint8 ``[B, H, ceil(Mb / 8)]``) and
``BRANCH/LAYER/kv_bits`` (uint8 ``[B, H, Mb, row_bytes]``), B 1 where the batch shares them. The
grid of each, block size and order of tokens included, is in the metadata, and checked where
symbols are used. A recipe with ``sparse.measure`` adds ``BRANCH/steps`` int64 ``[T]``,
``BRANCH/mass`` and ``BRANCH/error`` fp32 ``[T, layers]``, NaN where a step measured nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols import Grid, Symbols
from flashomni.util.files import write_bytes

FORMAT = "flashomni symbols 1"
GRID = ("seqlen_q", "seqlen_kv", "text", "block_m", "block_n", "shape", "order", "spans")


def save_symbols(
    path: str | Path,
    chosen: Mapping[str, Mapping[str, Symbols]],
    measured: Mapping[str, Tensor] | None = None,
    **about: str,
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file.
        chosen: symbols by branch and layer.
        measured: further tensors by name.
        about: further metadata.

    Raises:
        ValueError: there are no symbols.
    """
    from safetensors.torch import save

    tensors, grids = dict(measured or {}), {}
    for branch, layers in chosen.items():
        for layer, symbols in layers.items():
            name = f"{branch}/{layer}"
            grids[name] = {key: getattr(symbols.grid, key) for key in GRID}
            for part in ("q_bits", "kv_bits"):
                bits = getattr(symbols, part)
                rows = 1 if bits.stride(0) == 0 else bits.shape[0]
                tensors[f"{name}/{part}"] = bits[:rows].contiguous().cpu()
    if not grids:
        raise ValueError("no symbols were chosen: run a generation with a recipe that skips first")
    metadata = {"format": FORMAT, "grids": json.dumps(grids), **about}
    write_bytes(path, save({k: v.cpu().contiguous() for k, v in tensors.items()}, metadata))


@dataclass
class SymbolsFile:
    """Symbols that :func:`save_symbols` wrote.

    Attributes:
        path: of the file.
        grids: of each branch and layer, as JSON has it.
        tensors: by name, on the CPU.
    """

    path: str
    grids: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    _there: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path, layers: Sequence[str] = ()) -> SymbolsFile:
        """Read a file.

        Args:
            path: of the file.
            layers: names of those that it must have.

        Raises:
            ValueError: it cannot be read, holds no symbols, or has none of a layer.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"symbols {path} cannot be read: {error}") from error
        if metadata.get("format") != FORMAT:
            got = metadata.get("format")
            raise ValueError(f"symbols {path} must be of format {FORMAT!r}, got {got!r}")
        grids = json.loads(metadata["grids"])
        known = {name.partition("/")[2] for name in grids}
        missing = [name for name in layers if name not in known]
        if missing:
            raise ValueError(
                f"symbols {path} must have all layers of the model, got none of "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        return cls(str(path), grids, tensors)

    def of(self, branch: str, layer: str, grid: Grid, like: Tensor) -> Symbols:
        """The symbols of a layer.

        Args:
            branch: name.
            layer: name.
            grid: of its sequence.
            like: ``[B, S, H, D]``, for whose batch and heads they are, on its device.

        Raises:
            ValueError: they are of another grid, order, block size, batch or number of heads, or
                there are none.
        """
        name = f"{branch}/{layer}"
        if name not in self.grids:
            branches = ", ".join(sorted({key.partition("/")[0] for key in self.grids}))
            raise ValueError(
                f"symbols {self.path} have none of {name!r}; branches in it are {branches}"
            )
        saved = self.grids[name]
        wanted = json.loads(json.dumps({key: getattr(grid, key) for key in GRID}))
        parts = [self.tensors[f"{name}/{part}"] for part in ("q_bits", "kv_bits")]
        batch, heads = like.shape[0], like.shape[2]
        differs = [
            f"{key} {saved[key]}, not {wanted[key]}" for key in GRID if saved[key] != wanted[key]
        ]
        if parts[1].shape[1] != heads:
            differs.append(f"num_heads {parts[1].shape[1]}, not {heads}")
        if any(part.shape[0] not in (1, batch) for part in parts):
            differs.append(f"batch {parts[1].shape[0]}, not {batch}")
        if differs:
            raise ValueError(f"symbols {self.path} of {name!r} have {'; '.join(differs)}")
        key = (name, like.device)
        if key not in self._there:
            q_bits, kv_bits = (part.to(like.device) for part in parts)
            self._there[key] = q_bits, kv_bits
        q_bits, kv_bits = self._there[key]
        return Symbols(q_bits.expand(batch, -1, -1), kv_bits.expand(batch, -1, -1, -1), grid)


def attention_name(layer: str, number: int) -> str:
    """Name of an attention of a layer; few layers have a second one."""
    return f"{layer}/second" if number else layer


def measured(trace: Any, branch: str) -> dict[str, Tensor]:
    """Attention mass and error of D by step and layer, where the trace of a branch has them."""
    records = [record for record in trace.steps if record.branch == branch]
    rows = [
        (record.step, [(x.mass, x.error) for x in record.layers])
        for record in records
        if any(x.mass is not None for x in record.layers)
    ]
    if not rows:
        return {}
    found = {f"{branch}/steps": torch.tensor([step for step, _ in rows])}
    for place, name in enumerate(("mass", "error")):
        values = [[_number(pair[place]) for pair in pairs] for _, pairs in rows]
        found[f"{branch}/{name}"] = torch.tensor(values)
    return found


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
