"""Where things are kept between steps, and whether there is room for D before it is made."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.state.storage import Lane, Storage
from flashomni.util.words import in_bytes

DEVICE_SHARE, HOST_SHARE = 0.8, 0.5  # of what is free: the rest is for what steps need in passing
log = logging.getLogger("flashomni")


class Keeping:
    """How one model's histories are kept, and what brings them to the host and back.

    Args:
        settings: the section ``storage`` of the recipe.
        backend: of the passes over what is kept.
    """

    def __init__(self, settings: Any, backend: str | None) -> None:
        self._settings, self._backend = settings, backend
        self._lane: Lane | None = None

    def on(self, device: torch.device, on_host: bool | None = None) -> Storage:
        """For values of this device; on the host as the recipe says, or as the caller does."""
        if on_host is None:
            on_host = self._settings.history_device == "host"
        lane = self._lane_of(device) if on_host and device.type == "cuda" else None
        return Storage(self._settings.history_dtype, lane, self._backend)

    def _lane_of(self, device: torch.device) -> Lane:
        if self._lane is None or self._lane.device != device:
            self._lane = Lane(device)
        return self._lane

    def flush(self) -> None:
        """Let go of what was sent to the host."""
        if self._lane is not None:
            self._lane.flush()


def free_bytes(device: torch.device) -> int:
    """What is free on a device, as far as anybody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


@dataclass
class Room:
    """Room for D in one generation, found before the first step of a branch computes anything.

    On the device or on the host, as the recipe keeps histories; on the host too where the device
    has not enough; nowhere where that has not either: then nothing is carried.

    Args:
        keeping: of the model.
        model: how messages call it.

    Attributes:
        places: where D of each branch is kept; ``None`` for nowhere.
    """

    keeping: Keeping
    model: str = "the model"
    places: dict[str, Storage | None] = field(default_factory=dict)
    _said: list[str] = field(default_factory=list)
    _promised: dict[str, int] = field(default_factory=dict)

    def has(self, branch: str) -> bool:
        """Whether D of a branch may be carried, as far as that was decided."""
        return self.places.get(branch, self) is not None

    def find(
        self,
        branch: str,
        o: Tensor,
        num_layers: int,
        terms: int,
        agreed: Callable[[int], int] = int,
    ) -> None:
        """Decide, at a branch's first attention.

        Args:
            branch: name.
            o: of the shape and dtype of attention.
            num_layers: of the model; an upper bound of those that carry.
            terms: tensors a layer.
            agreed: the last of the places that any rank has come to, of this one's; ranks that
                share a sequence have to take the same way.
        """
        if branch in self.places:
            return
        wanted = self.keeping.on(o.device)
        nbytes = num_layers * terms * wanted.nbytes(o.shape, o.dtype)
        host = torch.device("cpu")
        devices = [host] if wanted.lane is not None else [o.device, host]
        devices = list(dict.fromkeys(devices))
        fits = (number for number, each in enumerate(devices) if self._fits(each, nbytes))
        number = agreed(next(fits, len(devices)))
        if number < len(devices):
            device = devices[number]
            self._promised[device.type] = self._promised.get(device.type, 0) + nbytes
            on_host = device != o.device
            self.places[branch] = self.keeping.on(o.device, on_host) if on_host else wanted
            self._say(branch, nbytes, "host" if on_host else "device")
            return
        self.places[branch] = None
        text = (
            f"carry is off in branch {branch!r}: it would keep {in_bytes(nbytes)}, which "
            "fit neither in device nor in host memory; sparse attention goes without"
        )
        self._said.append(text)
        log.warning("%s: %s", self.model, text)

    def _fits(self, device: torch.device, nbytes: int) -> bool:
        share = HOST_SHARE if device.type == "cpu" else DEVICE_SHARE
        return nbytes + self._promised.get(device.type, 0) <= share * free_bytes(device)

    def _say(self, branch: str, nbytes: int, where: str) -> None:
        text = f"carry keeps at most {in_bytes(nbytes)} in {where} memory for branch {branch!r}"
        self._said.append(text)
        log.info("%s: %s", self.model, text)

    def notes(self) -> list[str]:
        """What the report should say."""
        return list(self._said)
