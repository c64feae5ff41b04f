"""The authors' ragged attention wrapper on our op, against torch's attention of each request."""

import numpy as np
import pytest
import torch
from compat_cases import FLOOR, blocks, gpu, numpy_packed, starts
from torch.nn.functional import scaled_dot_product_attention

import flashomni

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Wrapper = flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper
# Queries and keys of each request: one token, block edges, equal neighbours, no queries, ragged.
LENGTHS = [(1, 1), (127, 129), (200, 330), (200, 330), (0, 50), (257, 128)]


class Requests:
    """Ragged requests with random symbols in the authors' order, and what must come out."""

    def __init__(
        self,
        dtype=torch.float32,
        lengths=LENGTHS,
        heads=6,
        kv_heads=2,
        head_dim=32,
        block_m=64,
        block_n=48,
        device="cpu",
    ):
        self.lengths, self.block_m, self.block_n = lengths, block_m, block_n
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.device = device
        q_tokens, kv_tokens = (sum(part) for part in zip(*lengths, strict=True))
        self.q = torch.randn(q_tokens, heads, head_dim, dtype=dtype, device=device)
        shape = (2, kv_tokens, kv_heads, head_dim)
        self.k, self.v = torch.randn(shape, dtype=dtype, device=device)
        self.q_masks, self.kv_masks = [], []  # S_c [Mb, H] and S_s [Mb, H, Nb] of each request
        for seqlen_q, seqlen_kv in lengths:
            rows, columns = blocks(seqlen_q, block_m), blocks(seqlen_kv, block_n)
            self.q_masks.append(torch.rand(rows, heads) < 0.6)
            self.kv_masks.append(torch.rand(rows, heads, columns) < 0.5)

    def wrapper(self, backend="auto", kv_layout="NHD", **options):
        wrapper = Wrapper(
            torch.empty(16, dtype=torch.uint8, device=self.device), kv_layout, backend=backend
        )
        q_counts, kv_counts = zip(*self.lengths, strict=True)
        wrapper.plan(
            starts(q_counts, self.device),
            starts(kv_counts, self.device),
            self.heads,
            self.kv_heads,
            self.head_dim,
            sparse_block_size_for_q=self.block_m,
            sparse_block_size_for_kv=self.block_n,
            q_data_type=self.dtype,
            **options,
        )
        return wrapper

    def symbols(self):
        """In the order of the arguments of ``run``."""
        sparse_info, sparse_info_indptr = numpy_packed(self.q_masks, self.device)
        sparse_kv_info, sparse_kv_info_indptr = numpy_packed(self.kv_masks, self.device)
        return sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr

    def live(self, is_full=False):
        """Bool ``[M, H]``: what is computed."""
        rows = [
            mask.repeat_interleave(self.block_m, 0)[:length]
            for mask, (length, _) in zip(self.q_masks, self.lengths, strict=True)
        ]
        live = torch.cat(rows).to(self.device)
        return torch.ones_like(live) if is_full else live

    def expected(self, dtype, scale=None, is_full=False):
        """Torch's attention of each request under a token mask, and log2 of the softmax sums."""
        outputs, sums, q_start, kv_start = [], [], 0, 0
        for (seqlen_q, seqlen_kv), mask in zip(self.lengths, self.kv_masks, strict=True):
            pairs = mask.transpose(0, 1).repeat_interleave(self.block_m, 1)
            pairs = pairs.repeat_interleave(self.block_n, 2)[:, :seqlen_q, :seqlen_kv]
            pairs = (pairs | is_full).to(self.device)
            q = self.q[q_start : q_start + seqlen_q].transpose(0, 1).to(dtype)
            keys = slice(kv_start, kv_start + seqlen_kv)
            k, v = (
                x[keys].transpose(0, 1).to(dtype).repeat_interleave(self.heads // self.kv_heads, 0)
                for x in (self.k, self.v)
            )
            o = scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)
            empty = ~pairs.any(-1, keepdim=True)
            outputs.append(o.masked_fill(empty, 0.0).transpose(0, 1))
            score = q.float() @ k.float().mT * (scale or self.head_dim**-0.5)
            sums.append(torch.logsumexp(score.masked_fill(~pairs, -torch.inf), -1).T / np.log(2))
            q_start, kv_start = q_start + seqlen_q, kv_start + seqlen_kv
        return torch.cat(outputs), torch.cat(sums)

    def check(self, got, untouched, scale=None, is_full=False):
        """Error at most twice torch's in the same dtype; cached tiles hold ``untouched``."""
        live = self.live(is_full)
        exact, _ = self.expected(torch.float64, scale, is_full)
        plain, _ = self.expected(self.dtype, scale, is_full)
        limit = 2 * (plain.double() - exact).abs()[live].max() + FLOOR
        assert got.shape == self.q.shape and got.dtype == self.dtype
        assert (got.double() - exact).abs()[live].max() <= limit
        assert torch.isclose(got[~live].float(), torch.tensor(untouched), equal_nan=True).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_ragged_requests_match_torch(backend, dtype, kv_layout):
    """GQA, blocks of two sizes; a new out is zero where cached, a given one keeps what it has."""
    problem = Requests(dtype)
    k, v = problem.k, problem.v
    if kv_layout == "HND":
        k, v = (x.transpose(0, 1).contiguous() for x in (k, v))
    wrapper = problem.wrapper(backend, kv_layout)
    problem.check(wrapper.run(problem.q, k, v, *problem.symbols()), 0.0)
    for value in (7.0, float("nan")):
        out = torch.full_like(problem.q, value)
        assert wrapper.run(problem.q, k, v, *problem.symbols(), out=out) is out
        problem.check(out, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (8, 2)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (16, 64), (32, 16)], ids=str)
def test_heads_and_blocks(backend, heads, block):
    """Heads that fill no byte, several query heads a key head, blocks of the authors and ours."""
    problem = Requests(heads=heads[0], kv_heads=heads[1], block_m=block[0], block_n=block[1])
    wrapper = problem.wrapper(backend, sm_scale=0.3)
    got = wrapper.run(problem.q, problem.k, problem.v, *problem.symbols())
    problem.check(got, 0.0, scale=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_to_base_two(backend):
    """Where nothing is visited it is -inf; cached tiles keep theirs, in a new one they are -inf."""
    problem = Requests()
    problem.kv_masks[2][1:3] = False  # rows without keys are zero
    live, (_, expected) = problem.live(), problem.expected(torch.float64)
    inputs = (problem.q, problem.k, problem.v, *problem.symbols())
    wrapper = problem.wrapper(backend)
    for out, lse in (wrapper.run(*inputs, return_lse=True), wrapper.run_return_lse(*inputs)):
        problem.check(out, 0.0)
        torch.testing.assert_close(lse[live], expected[live].float(), atol=1e-5, rtol=1e-5)
        assert (lse[~live] == -torch.inf).all() and (lse[live] == -torch.inf).any()
    given = torch.full_like(live, 3, dtype=torch.float32)
    assert torch.is_tensor(wrapper.run(*inputs, lse=given))
    torch.testing.assert_close(given[live], expected[live].float(), atol=1e-5, rtol=1e-5)
    assert (given[~live] == 3).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_full_ignores_the_symbols(backend):
    """With symbols and without them everything is computed."""
    problem = Requests()
    wrapper = problem.wrapper(backend)
    for symbols in ((), problem.symbols()):
        given = dict(zip(("sparse_info", "sparse_kv_info"), symbols, strict=False))
        out = torch.full_like(problem.q, float("nan"))
        wrapper.run(problem.q, problem.k, problem.v, **given, is_full=True, out=out)
        problem.check(out, 0.0, is_full=True)


def test_requests_may_lie_anywhere_in_the_bytes():
    """indptr is honoured: requests stored backwards, with bytes between them."""
    problem = Requests()
    sparse_info, sparse_kv_info, *_ = problem.symbols()
    moved = []
    for masks in (problem.q_masks, problem.kv_masks):
        rows = [flashomni.packbits(mask.flatten(), "little") for mask in masks]
        packed, where = [], [0] * (len(rows) + 1)
        for index in reversed(range(len(rows))):
            where[index] = sum(map(len, packed)) + 3
            packed += [torch.full((3,), 0xA5, dtype=torch.uint8), rows[index]]
        moved.append((torch.cat(packed), torch.tensor(where, dtype=torch.int32)))
    (q_bytes, q_indptr), (kv_bytes, kv_indptr) = moved
    assert len(q_bytes) > len(sparse_info) and len(kv_bytes) > len(sparse_kv_info)
    wrapper = problem.wrapper()
    got = wrapper.run(problem.q, problem.k, problem.v, q_bytes, kv_bytes, q_indptr, kv_indptr)
    problem.check(got, 0.0)


def test_the_base_indptr_count_unpacked_bits():
    """What programs hand to segment_packbits: where the bits of each request start."""
    problem = Requests()
    wrapper = problem.wrapper()
    for base, masks in (
        (wrapper._sparse_info_indptr_base, problem.q_masks),
        (wrapper._sparse_kv_info_indptr_base, problem.kv_masks),
    ):
        assert torch.equal(base, starts([mask.numel() for mask in masks]))
    assert wrapper._qo_indptr_buf.tolist() == [0, 1, 128, 328, 528, 528, 785]
    assert wrapper._kv_indptr_buf.tolist() == [0, 1, 130, 460, 790, 840, 968]
    assert (wrapper._sparse_block_size_for_q, wrapper._sparse_block_size_for_kv) == (64, 48)


def test_older_names_of_plan_and_run():
    """begin_forward, forward, forward_return_lse, end_forward, reset_workspace_buffer."""
    problem = Requests()
    inputs = (problem.q, problem.k, problem.v, *problem.symbols())
    wrapper = problem.wrapper(sm_scale=0.3)
    assert Wrapper.begin_forward is Wrapper.plan
    wrapper.reset_workspace_buffer(torch.empty(1), torch.empty(1))
    problem.check(wrapper.forward(*inputs, sm_scale=0.5), 0.0, scale=0.5)
    out, lse = wrapper.forward_return_lse(*inputs)
    problem.check(out, 0.0)
    assert lse.shape == problem.q.shape[:2]
    assert wrapper.end_forward() is None


def test_cuda_graph_buffers_hold_the_plan():
    """Plans of the same lengths may follow; others may not, a graph would not see them."""
    problem = Requests()
    indptr = [starts(counts) for counts in zip(*LENGTHS, strict=True)]
    buffers = [torch.zeros_like(x) for x in indptr]
    wrapper = Wrapper(torch.empty(1), "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    heads = (6, 2, 32, 64, 48)
    for _ in range(2):
        wrapper.plan(*indptr, *heads, q_data_type=torch.float32)
        assert all(torch.equal(*pair) for pair in zip(buffers, indptr, strict=True))
    problem.check(wrapper.run(problem.q, problem.k, problem.v, *problem.symbols()), 0.0)
    with pytest.raises(NotImplementedError, match=r"qo_indptr: .*lengths of the first"):
        wrapper.plan(indptr[0].clamp(max=500), indptr[1], *heads, q_data_type="float32")
    with pytest.raises(ValueError, match=r"qo_indptr must be \[7\], got \[6\]"):
        wrapper.plan(indptr[0][:-1], indptr[1][:-1], *heads, q_data_type="float32")
    with pytest.raises(ValueError, match="qo_indptr_buf must be a tensor with use_cuda_graph"):
        Wrapper(torch.empty(1), "NHD", use_cuda_graph=True)


@pytest.mark.slow
def test_run_reads_nothing_on_the_host():
    """One graph without breaks, symbols included: nothing waits for a value."""
    problem = Requests()
    wrapper = problem.wrapper()

    def run(q, k, v, *symbols):
        return wrapper.run(q * 2, k, v, *symbols, return_lse=True)

    inputs = (problem.q, problem.k, problem.v, *problem.symbols())
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(*inputs), run(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_ragged_requests_on_a_gpu(device):
    """In bf16, without a wait, and again from a captured CUDA graph with other symbols."""
    lengths = [(300, 520), (300, 520), (128, 256)]
    problem = Requests(torch.bfloat16, lengths, 4, 2, 64, 128, 128, device)
    wrapper, symbols = problem.wrapper(), problem.symbols()
    out = torch.full_like(problem.q, 7.0)
    inputs = (problem.q, problem.k, problem.v, *symbols)
    wrapper.run(*inputs, out=out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        wrapper.run(*inputs, out=out)
        _, lse = wrapper.run(*inputs, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    problem.check(out, 7.0)
    live, (_, expected) = problem.live(), problem.expected(torch.float64)
    torch.testing.assert_close(lse[live], expected[live].float(), atol=1e-3, rtol=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(*inputs, out=out)
    problem.q_masks = [~mask for mask in problem.q_masks]
    problem.kv_masks[0][:, 1] = False  # rows without keys are zero
    for old, new in zip(symbols, problem.symbols(), strict=True):
        old.copy_(new)
    out.fill_(7.0)
    graph.replay()
    problem.check(out, 7.0)
