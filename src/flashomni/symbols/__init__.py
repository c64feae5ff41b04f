"""Sparse symbols: one bit per block says compute or not; everything else in the library reads them.

Letters in shapes: B batch, H num_heads, M seqlen_q, N seqlen_kv, D head_dim,
Mb = ceil(M / block_m) query blocks, Nb = ceil(N / block_n) key blocks.

Two symbols (arXiv 2509.25401, section 3.2):

* S_c, ``q_bits``: 1 = compute the output tile (query block, head), 0 = take it from the cache.
* S_s, ``kv_bits``: 1 = visit the pair (query block, key block), 0 = leave it out of the softmax.

Bits are little endian inside a byte. A row of S_s is padded to whole 32-bit words, so that a
kernel can load words and iterate with find-first-set; padding bits are always 0.
"""

from flashomni.symbols.bits import pack_bits, q_bytes, row_bytes, unpack_bits
from flashomni.symbols.grid import Grid
from flashomni.symbols.symbols import Symbols

__all__ = ["Grid", "Symbols", "pack_bits", "q_bytes", "row_bytes", "unpack_bits"]
