"""What is particular to the portable backends: odd blocks, lists, refusals, configurations.

The contract itself is in test_attention.py, test_gemm_q.py and test_gemm_o.py, for every backend.
Without a GPU ``TRITON_INTERPRET=1 pytest -k portable`` runs both in Triton's interpreter.
"""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from conftest import device_for, random_symbols, refusal_skips, token_masks
from flashomni.kernels import gemm_o_update, select, sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import portable
from flashomni.symbols import Grid, Symbols

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(bool(portable.available()), reason="; ".join(portable.available())),
]
DEVICE = device_for("portable")


def attention_inputs(seqlen_q, seqlen_kv, heads, head_dim, dtype=torch.float32):
    q = torch.randn(1, seqlen_q, heads, head_dim, dtype=dtype, device=DEVICE)
    k, v = torch.randn(2, 1, seqlen_kv, heads, head_dim, dtype=dtype, device=DEVICE)
    return q, k, v


@pytest.mark.parametrize("blocks", [(48, 80), (256, 192), (16, 256)], ids=str)
def test_attention_with_blocks_that_are_no_power_of_two(blocks):
    """Tiles are cut down to divide the blocks; a key block may be several tiles."""
    grid = Grid(300, 500, block_m=blocks[0], block_n=blocks[1])
    q, k, v = attention_inputs(300, 500, 2, 32)
    symbols = random_symbols(grid, 1, 2, 0.7, 0.5).to(DEVICE)
    out = [
        sparse_attention(q, k, v, symbols, out=torch.full_like(q, 7.0), backend=backend)
        for backend in ("portable", "reference")
    ]
    torch.testing.assert_close(*out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_head_dims(head_dim, dtype):
    """Every head_dim of the models, with lse, within rounding of the definition."""
    grid = Grid(130, 260)
    q, k, v = attention_inputs(130, 260, 1, head_dim, dtype)
    symbols = random_symbols(grid, 1, 1, 1.0, 0.6).to(DEVICE)
    lse = torch.zeros(2, 1, 1, 130, device=DEVICE)
    with refusal_skips():
        got, exact = (
            sparse_attention(q, k, v, symbols, lse=lse[i], backend=backend)
            for i, backend in enumerate(("portable", "reference"))
        )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse[0], lse[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_attention_scale_need_not_be_positive(scale):
    """A negative scale turns the order of the scores around; zero makes them equal."""
    q, k, v = attention_inputs(70, 150, 2, 16)
    got, exact = (
        sparse_attention(q * 5, k, v, softmax_scale=scale, backend=backend)
        for backend in ("portable", "reference")
    )
    torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)


def test_key_block_lists():
    """Visited blocks with a valid key, ascending; -1 for cached rows; strides of 0 honoured."""
    from flashomni.kernels.attention._key_blocks import key_block_lists

    kv_len = torch.tensor([1000, 130, 0], dtype=torch.int32)
    grid = Grid(200, 1000, block_m=16, block_n=16, kv_len=kv_len)
    for symbols in (random_symbols(grid, 3, 2), random_symbols(grid, 1, 1).expand(3, 2)):
        blocks, counts = key_block_lists(symbols.to(DEVICE), kv_len.to(DEVICE))
        assert blocks.dtype == torch.int16
        q_mask, kv_mask = symbols.q_mask(), symbols.kv_mask()
        for b in range(3):
            valid = -(-int(kv_len[b]) // 16)
            for h in range(2):
                for i in range(grid.num_q_blocks):
                    expected = kv_mask[b, h, i, :valid].nonzero()[:, 0].tolist()
                    count = int(counts[b, h, i])
                    assert count == (len(expected) if q_mask[b, h, i] else -1)
                    assert blocks[b, h, i, : max(count, 0)].tolist() == expected[: max(count, 0)]


def test_refusals_have_reasons():
    """From metadata alone; nothing is copied or rerouted."""
    q, k, v = attention_inputs(64, 64, 2, 32)
    wide = torch.zeros(1, 64, 2, 272, device=DEVICE)
    for tensors, why in (
        ((wide, wide, wide), "head_dim must be at most 256, got 272"),
        ((q, k.mT.contiguous().mT, v), "k: the last dim must be contiguous, got stride 2"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            sparse_attention(*tensors, backend="portable")
    symbols = Symbols.dense(Grid(32, 32), 1, 65, DEVICE)
    o, weight = torch.zeros(1, 32, 65, 16, device=DEVICE), torch.zeros(8, 65 * 16, device=DEVICE)
    with pytest.raises(NotImplementedError, match="num_heads must be at most 64, got 65"):
        sparse_gemm_o(o, weight, None, symbols, backend="portable")
    symbols, o = symbols.grid and Symbols.dense(symbols.grid, 1, 2, DEVICE), o[:, :, :2]
    weight = torch.zeros(8, 32, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"terms\[1\] must have the dtype of weight"):
        gemm_o_update([o, o.half()], weight, None, symbols, backend="portable")
    with pytest.raises(NotImplementedError, match="weight: the last dim must be contiguous"):
        weight = torch.zeros(16, 32, device=DEVICE).T
        sparse_gemm_q(torch.zeros(1, 32, 16, device=DEVICE), weight, None, symbols,
                      backend="portable")  # fmt: skip


def test_rank():
    """Chosen on a GPU where nothing better accepts; the interpreter only runs when asked."""
    q, k, v = attention_inputs(16, 16, 1, 16)
    chosen = select("attention", AttentionCall(q, k, v, q.clone(), None, None, None, 1.0)).name
    assert chosen == ("cpu" if portable.INTERPRETED else "portable")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_never_synchronises_and_replays_in_a_cuda_graph():
    """Nothing of a call is decided on the host: new bits and lengths, same graph."""
    kv_len = torch.tensor([900], dtype=torch.int32, device=DEVICE)
    grid = Grid(700, 1000, kv_len=kv_len)
    q, k, v = attention_inputs(700, 1000, 2, 64, torch.bfloat16)
    symbols, out = random_symbols(grid, 1, 2).to(DEVICE), torch.zeros_like(q)
    run = lambda out: sparse_attention(q, k, v, symbols, out=out, backend="portable")  # noqa: E731
    run(out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for length in (900, 129, 0):
        other = random_symbols(grid, 1, 2)
        symbols.q_bits.copy_(other.q_bits)
        symbols.kv_bits.copy_(other.kv_bits)
        kv_len.fill_(length)
        expected = run(torch.zeros_like(out))
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
        rows, _ = token_masks(symbols)
        assert bool(out.any()) == bool(rows.any() and length)
