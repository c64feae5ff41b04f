"""The widest floats of a device: definitions sum in them, so that their rounding is not felt."""

from __future__ import annotations

import torch


def wide(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64
