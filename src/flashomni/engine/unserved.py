"""Says so where no kernel runs: once in the log, and in every report."""

from __future__ import annotations

import logging

import torch

from flashomni.dispatch import has_kernel, refusals, registered

log = logging.getLogger("flashomni")


class Unserved:
    """Whether a device is one that no attention kernel runs on, and why.

    Args:
        model: its name, for the log.
        backend: that the user has named: nothing is said then.
    """

    def __init__(self, model: str, backend: str | None) -> None:
        self._model, self._backend = model, backend
        self._said: dict[str, str] = {}  # type of device -> what was said, or nothing

    def look(self, device: torch.device) -> None:
        """Told where a generation computes; asks once for a type of device."""
        kind = device.type
        if self._backend is not None or kind in self._said:
            return
        self._said[kind] = "" if has_kernel("attention", kind) else told(kind)
        if self._said[kind]:
            log.warning("%s: %s", self._model, self._said[kind])

    def notes(self) -> list[str]:
        """For the report."""
        return [text for text in self._said.values() if text]


def told(device: str) -> str:
    """The sentence; it names what every kernel for that type of device lacks."""
    lacking = refusals("attention")
    kinds = {backend.name: backend.device for backend in registered("attention")}
    why = [f"{name} {text}" for name, text in lacking.items() if kinds.get(name, "cuda") == device]
    because = "; ".join(why) or "there are some for cuda and for cpu"
    return (
        f"no attention kernel runs on {device} here ({because}): dense attention is torch's own, "
        "and sparse or padded attention its definition, which is slow and skips no time; layers "
        "that are cached whole are skipped all the same"
    )
