"""The ops, a folder each: ``op.py`` is the contract and the definition, other files backends."""

from flashomni.dispatch import OPS, backends, refusals, registered, select
from flashomni.kernels.attention.op import ForecastTerms, sparse_attention
from flashomni.kernels.gemm_o.op import gemm_o_update, sparse_gemm_o
from flashomni.kernels.gemm_q.op import sparse_gemm_q
from flashomni.kernels.merge.op import Part, difference_
from flashomni.kernels.refresh.op import refresh
from flashomni.kernels.summarise.op import Summary, summarise

__all__ = [
    "ForecastTerms",
    "OPS",
    "Part",
    "Summary",
    "backends",
    "difference_",
    "gemm_o_update",
    "refresh",
    "refusals",
    "registered",
    "select",
    "sparse_attention",
    "sparse_gemm_o",
    "sparse_gemm_q",
    "summarise",
]
