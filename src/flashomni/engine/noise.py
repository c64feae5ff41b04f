"""Noise levels of a generation's steps, as far as it is known what its scheduler does with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.callers import step_index

EULER = "FlowMatchEulerDiscreteScheduler"
# Settings under which its step is not ``sample + (next sigma - sigma) output``, or its sigmas rise.
OTHERWISE = ("stochastic_sampling", "invert_sigmas")


class Noise:
    """Sigmas of a generation, on their way to the host since before its first step.

    Args:
        sigmas: ``[num_steps + 1]``, the one behind the last step included; on any device.
    """

    def __init__(self, sigmas: Tensor) -> None:
        self._sigmas, self._event = sigmas.detach(), None
        self._levels: tuple[float, ...] | None = None
        if sigmas.is_cuda:
            host = torch.empty(sigmas.shape, dtype=sigmas.dtype, device="cpu", pin_memory=True)
            host.copy_(self._sigmas, non_blocking=True)
            self._sigmas, self._event = host, torch.cuda.Event()
            self._event.record()

    @classmethod
    def of(cls, scheduler: Any) -> Noise | None:
        """What a scheduler will do from where it stands; read no value, wait for nothing.

        Args:
            scheduler: in front of a generation's first step; anything else is not known.

        Returns:
            ``None`` unless it is Euler's method on a flow: its steps change the latents by
            ``(next sigma - sigma) output``, and nothing else.
        """
        if type(scheduler).__name__ != EULER:
            return None
        config, sigmas = getattr(scheduler, "config", {}), getattr(scheduler, "sigmas", None)
        if not isinstance(config, Mapping) or any(config.get(name) for name in OTHERWISE):
            return None
        if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
            return None
        start = step_index(scheduler)
        start = (getattr(scheduler, "begin_index", None) or 0) if start is None else start
        return cls(sigmas[start:])

    def levels(self) -> tuple[float, ...]:
        """The sigmas; behind the first step they have long been here."""
        if self._levels is None:
            if self._event is not None:
                self._event.synchronize()
            self._levels = tuple(self._sigmas.tolist())
        return self._levels
