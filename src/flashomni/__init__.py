"""FlashOmni: diffusion transformers without computing what hardly matters (arXiv 2509.25401)."""

from flashomni.engine import Engine, Recipe, Summary
from flashomni.kernels import gemm_o_update, sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.models import accelerate
from flashomni.symbols import Grid, Symbols

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Grid",
    "Recipe",
    "Summary",
    "Symbols",
    "accelerate",
    "gemm_o_update",
    "sparse_attention",
    "sparse_gemm_o",
    "sparse_gemm_q",
]
