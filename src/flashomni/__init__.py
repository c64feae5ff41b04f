"""FlashOmni: diffusion transformers without computing what hardly matters (arXiv 2509.25401)."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from flashomni.engine import Engine, Recipe, Summary
from flashomni.kernels import gemm_o_update, sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.models import Blocks, accelerate, engine_of, restore
from flashomni.symbols import Grid, Symbols

__version__ = "0.2.0"

logging.getLogger("flashomni").addHandler(logging.NullHandler())

__all__ = [
    "Blocks",
    "Engine",
    "Grid",
    "Recipe",
    "Summary",
    "Symbols",
    "accelerate",
    "engine_of",
    "gemm_o_update",
    "restore",
    "sparse_attention",
    "sparse_gemm_o",
    "sparse_gemm_q",
]

_AUTHORS_NAMES = (
    "BatchFlashOmniFAWithRaggedKVWrapper",
    "flashomni_gemm",
    "flashomni_gemm_reduction",
    "packbits",
    "segment_packbits",
)

if not TYPE_CHECKING:  # type checkers would take every name of a module with __getattr__ for given

    def __getattr__(name: str) -> object:
        """What code written for the authors' package looks for here; loaded on first use."""
        if name == "attention":
            return import_module("flashomni.attention")
        if name == "Bar":  # needs the packages of the extra "lab"
            return import_module("flashomni.lab.bars").Bar
        if name == "compare":  # needs the packages of the extra "lab"
            return import_module("flashomni.lab.fidelity.compare").compare
        if name == "zoo":  # where it was in version 0.1
            return import_module("flashomni.lab.zoo")
        if name == "tune":  # needs the extra "lab"; the package is named tuning, this the function
            return import_module("flashomni.tuning").tune
        if name in _AUTHORS_NAMES:
            return getattr(import_module("flashomni.compat"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
