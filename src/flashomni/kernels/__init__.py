"""The three ops. An unsuffixed file is an op's contract and definition, a suffix is a backend."""

from flashomni.kernels.attention import Forecast, sparse_attention
from flashomni.kernels.dispatch import OPS, backends, refusals, registered, select
from flashomni.kernels.gemm_o import gemm_o_update, sparse_gemm_o
from flashomni.kernels.gemm_q import sparse_gemm_q

__all__ = [
    "Forecast",
    "OPS",
    "backends",
    "gemm_o_update",
    "refusals",
    "registered",
    "select",
    "sparse_attention",
    "sparse_gemm_o",
    "sparse_gemm_q",
]
