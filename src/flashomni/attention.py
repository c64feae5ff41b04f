"""The module path ``flashomni.attention`` of the authors' package, for code written for it.

The op itself is ``flashomni.sparse_attention``, in ``kernels/attention.py``.
"""

from flashomni.compat import BatchFlashOmniFAWithRaggedKVWrapper

__all__ = ["BatchFlashOmniFAWithRaggedKVWrapper"]
