"""What the Hopper kernels share: names that moved between Triton releases, TMA, refusals."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Newer releases than Triton 3.6 renamed these.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

# From 3.8 on, what a wgmma reads from registers is moved to registers of its own first, so that
# nothing can overwrite it meanwhile. A kernel that is short of registers then spills.
MOVES_OPERANDS = gl.constexpr(tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 8))

TMA_BYTES = 16  # alignment of addresses and strides


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def view_as(buffer, desc):
        """The shared memory of ``buffer`` as a tile of a TMA descriptor."""
        return buffer.reinterpret(desc.dtype, desc.block_shape, desc.layout)

else:

    @gluon.jit
    def view_as(buffer, desc):
        """The shared memory of ``buffer`` as a tile of a TMA descriptor."""
        return buffer._reinterpret(desc.dtype, desc.block_shape, desc.layout)


@gluon.jit
def wait_for_previous_kernel():
    """Block until the kernel before this one in the stream is done, if this one started early."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@functools.cache
def hopper_refusals() -> list[str]:
    """Why no kernel for compute capability 9.0 can run on this machine."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < (3, 6):
        return [f"needs Triton 3.6 or newer, found {triton.__version__}"]
    if not torch.cuda.is_available():
        return ["needs a CUDA device"]
    if torch.version.hip is not None:  # an MI200 calls itself 9.0 as well
        return [f"is for NVIDIA's cards, and this torch is for AMD's (ROCm {torch.version.hip})"]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if (9, 0) not in found:
        return [f"needs compute capability 9.0, found {sorted(found)}"]
    return []


@functools.cache
def is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) == (9, 0)


@functools.cache
def num_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device; nothing is paid where that is ``device`` already."""
    if torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def layout_refusals(name: str, x: Tensor) -> list[str]:
    """Why TMA cannot address ``x``; sizes of 1 may have any stride."""
    size = x.element_size()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return [f"{name} must be contiguous in its last dim, its stride is {x.stride(-1)}"]
    for dim, (length, stride) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        if length > 1 and (stride <= 0 or stride * size % TMA_BYTES):
            return [
                f"{name} must have strides of a positive multiple of {TMA_BYTES // size} elements, "
                f"that of dim {dim} is {stride}"
            ]
    if x.data_ptr() % TMA_BYTES:
        return [f"{name} must start at an address that is a multiple of {TMA_BYTES} bytes"]
    return []


_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of ``x`` ``[B, S, H, D]`` as ``[B, H, S, D]``, in blocks of rows x columns.

    Columns from D on read as zero and are never written.
    """
    batch, seqlen, num_heads, head_dim = x.shape
    aligned = TMA_BYTES // x.element_size()
    strides = [
        stride if length > 1 else math.ceil(head_dim / aligned) * aligned
        for length, stride in (
            (batch, x.stride(0)),
            (num_heads, x.stride(2)),
            (seqlen, x.stride(1)),
        )
    ]
    return TensorDescriptor(
        x, [batch, num_heads, seqlen, head_dim], [*strides, 1], [1, 1, rows, columns], _layout
    )
