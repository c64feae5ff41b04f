"""Where Triton kernels run on this machine, and what they refuse there.

With ``TRITON_INTERPRET=1`` they run, slowly, in Triton's interpreter on the CPU; then they come
below every real backend and run only if asked for.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
RANK = 5 if INTERPRETED else 30
DEVICE = "cpu" if INTERPRETED else "cuda"


def available() -> list[str]:
    """Why this machine cannot run Triton kernels; empty if it can."""
    if INTERPRETED:
        return []
    if not torch.cuda.is_available():
        return ["no GPU (TRITON_INTERPRET=1 runs it slowly on the CPU)"]
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        major, minor = capability
        return [f"needs compute capability 8.0 or newer, this device has {major}.{minor}"]
    return []


def refuse_device(tensor: Tensor) -> list[str]:
    got = tensor.device.type
    if got != DEVICE:
        return [f"tensors are on {got}, this backend is for {DEVICE}"]
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return ["Triton's interpreter cannot multiply bfloat16"]
    return []
