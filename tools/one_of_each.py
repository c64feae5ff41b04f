"""One call of every GPU kernel, small and ragged: for compute-sanitizer.

compute-sanitizer --tool racecheck python tools/one_of_each.py sm90
"""

import argparse

import torch

from flashomni.kernels import gemm_o_update, sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.common.rope import pack_rope
from flashomni.lab.ops.shapes import exact_symbols
from flashomni.policies import AttentionSite, make_policy
from flashomni.symbols import Grid

SEQLEN, HEADS, HEAD_DIM, OFFSET = 700, 3, 128, 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", default="sm90")
    name = parser.parse_args().backend
    torch.manual_seed(0)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    kv_len = torch.tensor([650], dtype=torch.int32, device="cuda")
    grid = Grid(SEQLEN, SEQLEN, (0, OFFSET))
    symbols = exact_symbols(grid, HEADS, 0.6, 0.5).to("cuda")
    q, k, v = torch.randn(3, 1, SEQLEN, HEADS, HEAD_DIM, **kind)
    lse = torch.zeros(1, HEADS, SEQLEN, device="cuda")
    sparse_attention(q, k, v, symbols, lse=lse, kv_len=kv_len, backend=name)
    sparse_attention(q, k, v, kv_len=kv_len, backend=name)
    rows, width = SEQLEN - OFFSET, HEADS * HEAD_DIM
    x, weight = torch.randn(1, rows, width, **kind), torch.randn(width, width, **kind) / 20
    angle = torch.rand(rows, HEAD_DIM, device="cuda")
    tables = pack_rope(angle.cos(), angle.sin())
    options = {"norm_eps": 1e-6, "rope": tables, "row_offset": OFFSET, "backend": name}
    queries = torch.zeros(1, rows, HEADS, HEAD_DIM, **kind)
    sparse_gemm_q(x, weight, None, symbols, out=queries, **options)
    terms, coefficients = torch.randn(2, 1, rows, width, **kind), torch.ones(2, device="cuda")
    where = {"row_offset": OFFSET, "backend": name}
    sparse_gemm_o(q[:, OFFSET:], weight, None, symbols, terms, coefficients, **where)
    gemm_o_update([q[:, OFFSET:], k[:, OFFSET:]], weight, None, symbols, **where)
    site = AttentionSite.alone(q, k, grid)
    make_policy("flashomni", tau_q=0.5, tau_kv=0.5)(site)
    make_policy("topk")(site)
    torch.cuda.synchronize()
    print(f"{name}: one call of each kernel")


if __name__ == "__main__":
    main()
