"""Which part of a step a kernel belongs to, by its name.

A name tells what a kernel does, not whom it serves: matrix products of a policy count as GEMM, and
so do the dense projections of Full steps. On a CPU torch's operators stand for kernels.
"""

from __future__ import annotations

import re

ATTENTION, GEMM_Q, GEMM_O, GEMM = "attention", "gemm_q", "gemm_o", "other GEMM"
FORECAST = "forecast"
POINTWISE, SYMBOLS, COPIES = "norm, RoPE, elementwise", "symbols", "copies"
OTHER, IDLE = "other", "idle"
PARTS = (ATTENTION, GEMM_Q, GEMM_O, GEMM, POINTWISE, SYMBOLS, FORECAST, COPIES, OTHER, IDLE)

# The first pattern that is found anywhere in the name decides.
TABLE = [
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        # ours
        (GEMM_Q, r"^gemm_q_"),
        (GEMM_O, r"^gemm_o_"),
        (ATTENTION, r"^attention_kernel|^_empty_kernel"),
        (POINTWISE, r"^_(modulate|norm_rope)_kernel"),
        (FORECAST, r"^(_differences|_weighted_sum|forecast)_kernel"),
        (
            SYMBOLS,
            r"^_(means|heavy|most|order)_kernel|^_list_(tiles|heads)|^list_kernel|"
            r"radix_?sort|bitonicsort|gathertopk|^aten::(topk|sort|argsort|cumsum)",
        ),
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
    return next((part for part, pattern in TABLE if pattern.search(name)), OTHER)
