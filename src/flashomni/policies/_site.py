"""What a policy is shown: one attention of one layer in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols import Grid


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention: its tensors, where it is in the model and where in the generation.

    Args:
        q: ``[B, M, H, D]`` queries after norm and RoPE, as attention gets them.
        k: ``[B, N, Hkv, D]`` keys likewise.
        v: ``[B, N, Hkv, D]`` values.
        grid: blocks, text, valid length and geometry.
        layer: position in the list of layers, from 0.
        num_layers: length of that list.
        heads: global indices of the H heads here (a device may hold only some of them).
        step: of the generation, from 0.
        num_steps: of this generation.
        progress: fp32 scalar on the device, (step + 1) / num_steps, in (0, 1].
        branch: conditioning branch ("cond", "uncond", ...).
        softmax_scale: of the scores.
        guide: ``[B, H, Mb, T]``, what each query block gives to each text token in the model's
            cross-attention, rows sum to 1; ``None`` where there is none.
        backend: the backend that the user asked for, or ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid
    layer: int
    num_layers: int
    heads: Sequence[int]
    step: int
    num_steps: int
    progress: Tensor
    branch: str
    softmax_scale: float
    guide: Tensor | None = None
    backend: str | None = None

    @classmethod
    def alone(
        cls, q: Tensor, k: Tensor, grid: Grid, progress: Tensor | None = None, **known: Any
    ) -> AttentionSite:
        """The site of an attention that is in no model: for benchmarks, tests and examples.

        Args:
            progress: by default that of the last step.
            known: other fields; the rest is the only layer in the only step, values like keys.
        """
        if progress is None:
            progress = torch.ones((), device=q.device)
        fields: dict[str, Any] = {
            "v": k,
            "layer": 0,
            "num_layers": 1,
            "heads": range(q.shape[2]),
            "step": 0,
            "num_steps": 1,
            "branch": "main",
            "softmax_scale": q.shape[-1] ** -0.5,
        }
        return cls(q=q, k=k, grid=grid, progress=progress, **{**fields, **known})
