"""Which part of a step a kernel belongs to, by its name.

Our own kernels are found where backends are: the folder of an op has its kernels, and so has the
module of a backend that another package brings. For other people's there are patterns.

A name tells what a kernel does, not whom it serves: matrix products of a policy count as GEMM, and
so do the dense projections of Full steps. On a CPU torch's operators stand for kernels.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType

from flashomni.dispatch import FOLDERS, OPS, registered

ATTENTION, GEMM_Q, GEMM_O, GEMM = "attention", "gemm_q", "gemm_o", "other GEMM"
FORECAST = "forecast"
POINTWISE, SYMBOLS, COPIES = "norm, RoPE, elementwise", "symbols", "copies"
OTHER, IDLE = "other", "idle"
PARTS = (ATTENTION, GEMM_Q, GEMM_O, GEMM, POINTWISE, SYMBOLS, FORECAST, COPIES, OTHER, IDLE)

# What an op is in a step; of the ops of a folder, a kernel is of the one that its name has in it.
OF_OP = {
    "attention": ATTENTION,
    "gemm_q": GEMM_Q,
    "gemm_o": GEMM_O,
    "gemm_o_update": GEMM_O,
    "differences": FORECAST,
    "weighted_sum": FORECAST,
    "summarise": SYMBOLS,
    **dict.fromkeys(FOLDERS["flashomni.symbols.choice"], SYMBOLS),
}
# What a kernel does beside the op's own work, by a word of its name.
ASIDE = {"forecast": FORECAST, "list": SYMBOLS, "order": SYMBOLS}
SHARED = "flashomni.kernels.common"  # its kernels make lists of symbols

# The first pattern that is found anywhere in the name decides.
TABLE = [
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        (SYMBOLS, r"radix_?sort|bitonicsort|gathertopk|^aten::(topk|sort|argsort|cumsum)"),
        # torch.compile's, before the words that their names collect
        (ATTENTION, r"^triton_tem_.*(flex_?attention|scaled_dot)"),
        (GEMM, r"^triton_tem_"),
        (POINTWISE, r"^triton_(poi|red|per|for|mix|unk)_"),
        # other people's attention
        (
            ATTENTION,
            r"cudnn.*(sdpa|flash|attention|mha)|cudnn_generated.*fprop|flash_?fwd|flash_?att|"
            r"fmha|efficient_attention|mem_eff|flex_attention|scaled_dot_product|"
            r"^flashomni::.*attention",
        ),
        (
            GEMM,
            r"nvjet|cutlass|gemm|gemv|xmma|cublas|wgmma|splitkreduce|"
            r"^aten::(addmm|mm|bmm|baddbmm|linear|matmul|convolution|_convolution|mkldnn)|"
            r"conv(olution)?\d?d|implicit_convolve|mkl_?dnn|^mkl",
        ),
        (COPIES, r"memcpy|memset|copy_kernel|copy_device|direct_copy|catarraybatched|"
                 r"^aten::(copy_|cat|clone|contiguous|_to_copy|fill_|zero_)|fillfunctor|"
                 r"gather_kernel|index_?select|transpose_kernel|nchwtonhwc|nhwctonchw"),
        (
            POINTWISE,
            r"elementwise|layer_?norm|rms_?norm|reduce_kernel|softmax|gelu|silu|batchnorm|"
            r"vectorized|unrolled|cunn_|"
            r"^aten::(add|sub|mul|div|pow|rsqrt|mean|sum|native_layer_norm|gelu|silu|neg|stack|"
            r"where|exp|sqrt|var|clamp|clip|sin|cos|rms_norm|_fused_rms_norm|addcmul|lerp|square|"
            r"reciprocal|all|any|max|min|amax|eq|lt|gt|le|ge|bitwise|logical|__)",
        ),
    )
]  # fmt: skip


def part_of(kernel: str) -> str:
    """The part of a step that a kernel is: one of ``PARTS``, ``other`` where no pattern fits.

    Args:
        kernel: its name as a profiler shows it.
    """
    name = kernel.removeprefix("void ").strip()
    mine = ours().get(name)
    return mine or next((part for part, pattern in TABLE if pattern.search(name)), OTHER)


@functools.cache
def ours() -> dict[str, str]:
    """Every kernel of a registered backend by its name, and the part that it is."""
    found: dict[str, str] = {}
    for op in OPS:
        for backend in registered(op):
            home = backend.run.__module__
            folder = next((name for name in FOLDERS if home.startswith(f"{name}.")), None)
            ops = [op] if folder is None else FOLDERS[folder]
            for module in _modules(home if folder is None else folder):
                for name in _kernels(module):
                    named = next((one for one in ops if one in name), ops[0])
                    aside = next((ASIDE[word] for word in ASIDE if word in name), None)
                    found.setdefault(name, aside or OF_OP.get(named, POINTWISE))
    for module in _modules(SHARED):
        found.update(dict.fromkeys(_kernels(module), SYMBOLS))
    return found


def _modules(name: str) -> list[ModuleType]:
    """A module, and what of its folder is imported."""
    return [
        module for known, module in list(sys.modules.items()) if f"{known}.".startswith(f"{name}.")
    ]


def _kernels(module: ModuleType) -> Iterator[str]:
    """Names of the Triton functions that a module defines; those that are launched among them."""
    for name, thing in list(vars(module).items()):
        function = getattr(thing, "fn", None)
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            yield name
