"""The authors' public API (github.com/qiaolian9/FlashOmni) on top of our ops.

Code written for their package finds these names in ``flashomni`` itself; here are also the
converters between their ragged packing of symbols and :class:`flashomni.Symbols`.
"""

from flashomni.compat.gemm import flashomni_gemm, flashomni_gemm_reduction
from flashomni.compat.packing import from_packed, packbits, segment_packbits, to_packed
from flashomni.compat.ragged import BatchFlashOmniFAWithRaggedKVWrapper

__all__ = [
    "BatchFlashOmniFAWithRaggedKVWrapper",
    "flashomni_gemm",
    "flashomni_gemm_reduction",
    "from_packed",
    "packbits",
    "segment_packbits",
    "to_packed",
]
