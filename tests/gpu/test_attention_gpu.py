"""sparse_attention on a GPU, in the dtypes and shapes of tensor-core backends."""

import pytest
import torch

from conftest import random_symbols, refusal_skips, token_masks
from flashomni.kernels import refusals, registered, sparse_attention
from flashomni.symbols import Grid, Symbols

pytestmark = pytest.mark.gpu

NAMES = [b.name for b in registered("attention") if b.name not in ("cpu", "reference")]
NAMES += [name for name in refusals("attention") if name not in NAMES]
POISON = 7.0
# (batch, seqlen_q, seqlen_kv, heads, key heads, head_dim)
SHAPES = [
    (1, 1, 1, 1, 1, 128),
    (1, 40, 1290, 2, 1, 64),
    (2, 129, 127, 4, 2, 80),
    (2, 1000, 900, 4, 4, 128),
    (1, 640, 4500, 3, 1, 128),
    (1, 300, 700, 2, 2, 96),
    (3, 260, 520, 2, 1, 256),
]


@pytest.fixture(params=NAMES)
def backend(request):
    reason = refusals("attention").get(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def tensors(shape, dtype):
    batch, seqlen_q, seqlen_kv, heads, kv_heads, head_dim = shape
    q = torch.randn(batch, seqlen_q, heads, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, batch, seqlen_kv, kv_heads, head_dim, device="cuda").to(dtype)
    return q, k, v


def attend(*args, **kwargs):
    with refusal_skips():
        return sparse_attention(*args, **kwargs)


def reference(q, k, v, symbols=None, kv_len=None):
    """The definition in fp32: out and lse."""
    out = torch.full(q.shape, POISON, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), POISON, device=q.device)
    sparse_attention(
        q.float(), k.float(), v.float(), symbols, out=out, lse=lse, kv_len=kv_len,
        backend="reference",
    )  # fmt: skip
    return out, lse


def torch_error(q, k, v, pairs, exact, rows):
    """Largest error of torch's own attention in the dtype of ``q``."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=pairs
    )
    plain = plain.transpose(1, 2).masked_fill(~pairs.any(-1).mT[..., None], 0.0)
    floor = torch.finfo(q.dtype).eps / 2 * exact[rows].abs().max()  # torch may be exact by luck
    return (plain.float() - exact)[rows].abs().max() + floor / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(backend, shape, dtype):
    """Random symbols with valid lengths; cached rows of out and lse keep what they had."""
    q, k, v = tensors(shape, dtype)
    lengths = torch.randint(0, shape[2] + 1, (shape[0],), dtype=torch.int32)
    for density in (0.0, 0.3, 1.0):
        for kv_len in (None, lengths):
            grid = Grid(shape[1], shape[2], kv_len=kv_len)
            symbols = random_symbols(grid, shape[0], shape[3], 0.7, density).to("cuda")
            rows, pairs = token_masks(symbols)
            live = rows.mT[..., None].expand_as(q)
            out = torch.full_like(q, POISON)
            lse = torch.full(rows.shape, POISON, device="cuda")
            attend(q, k, v, symbols, out=out, lse=lse, backend=backend)
            exact, exact_lse = reference(q, k, v, symbols)
            assert (out[~live] == POISON).all() and (lse[~rows] == POISON).all()
            if rows.any():
                limit = 2 * torch_error(q, k, v, pairs, exact, live)
                assert (out.float() - exact)[live].abs().max() <= limit
            torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("block_n", [64, 128])
def test_rows_without_keys(backend, block_n):
    """Zeros and -inf, where the symbols leave a row empty and where kv_len does."""
    q, k, v = tensors((2, 300, 400, 2, 1, 128), torch.bfloat16)
    grid = Grid(300, 400, block_n=block_n)
    symbols = random_symbols(grid, 2, 2, 1.0, 0.5).to("cuda")
    symbols.kv_bits[:, :, 1] = 0
    kv_len = torch.tensor([400, 0], dtype=torch.int32, device="cuda")
    out, lse = torch.full_like(q, POISON), torch.full((2, 2, 300), POISON, device="cuda")
    attend(q, k, v, symbols, out=out, lse=lse, kv_len=kv_len, backend=backend)
    exact, exact_lse = reference(q, k, v, symbols, kv_len)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    assert (out[0, 128:256] == 0).all() and (lse[0, :, 128:256] == -torch.inf).all()
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=1e-3)


def test_strided_inputs_and_shared_symbols(backend):
    """Slices of a fused projection and symbols of stride 0 give the same bits as copies."""
    fused = torch.randn(2, 520, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.unbind(2)
    shared = random_symbols(Grid(520, 520), 1, 1, 0.8, 0.5).to("cuda").expand(2, 4)
    copied = Symbols(shared.q_bits.contiguous(), shared.kv_bits.contiguous(), shared.grid)
    wide = torch.zeros(2, 520, 4, 256, device="cuda", dtype=q.dtype)
    attend(q, k, v, shared, out=wide[..., :128], backend=backend)
    plain = torch.zeros_like(q, memory_format=torch.contiguous_format)
    attend(*(x.contiguous() for x in (q, k, v)), copied, out=plain, backend=backend)
    assert torch.equal(wide[..., :128], plain) and (wide[..., 128:] == 0).all()


def test_without_symbols_and_with_ones(backend):
    """Dense attention, and the same through symbols that are all 1."""
    q, k, v = tensors((2, 700, 900, 4, 2, 128), torch.bfloat16)
    for kv_len in (None, torch.tensor([900, 333], dtype=torch.int32, device="cuda")):
        dense = attend(q, k, v, kv_len=kv_len, backend=backend)
        ones = Symbols.dense(Grid(700, 900, kv_len=kv_len), 2, 4, "cuda")
        through_symbols = attend(q, k, v, ones, backend=backend)
        torch.testing.assert_close(through_symbols, dense)
        exact, _ = reference(q, k, v, ones)
        torch.testing.assert_close(dense.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_kv", [1, 130, 6000])
def test_repeats_agree_in_every_bit(backend, seqlen_kv, head_dim):
    """More tiles than programs, tiles of one visit, many orders of arrival, one result."""
    q, k, v = tensors((1, 6000, seqlen_kv, 8, 8, head_dim), torch.bfloat16)
    symbols = random_symbols(Grid(6000, seqlen_kv), 1, 8, 0.7, 0.3).to("cuda")
    results = [
        attend(q, k, v, symbols, out=torch.full_like(q, POISON), backend=backend) for _ in range(12)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
    dense = attend(q, k, v, backend=backend)
    exact, _ = reference(q[:, -200:], k, v)
    torch.testing.assert_close(dense[:, -200:].float(), exact, atol=2e-2, rtol=2e-2)


def test_captured_in_a_graph(backend):
    """No host synchronisation: a replay reads the symbols that are there then."""
    q, k, v = tensors((1, 1000, 1000, 2, 2, 128), torch.bfloat16)
    grid = Grid(1000, 1000)
    first, second = (random_symbols(grid, 1, 2, 0.7, d).to("cuda") for d in (0.2, 0.8))
    symbols = Symbols(first.q_bits.clone(), first.kv_bits.clone(), grid)
    out = torch.full_like(q, POISON)
    expected = [
        attend(q, k, v, s, out=torch.full_like(q, POISON), backend=backend) for s in (first, second)
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_attention(q, k, v, symbols, out=out, backend=backend)
    for source, want in zip((first, second), expected, strict=True):
        symbols.q_bits.copy_(source.q_bits)
        symbols.kv_bits.copy_(source.kv_bits)
        out.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16, got float32"),
        ({"head_dim": 36}, "head_dim must be a multiple of 8 up to 256, got 36"),
        ({"block_m": 64}, "block_m must be 128, got 64"),
        ({"block_n": 48}, "block_n must be a multiple of 64, got 48"),
        ({"scale": -1.0}, "softmax_scale must be positive, got -1.0"),
        ({"offset": 1}, "q must start at an address that is a multiple of 16 bytes"),
        ({"expand": True}, "k must have strides of a positive multiple of 8 elements"),
    ],
)
def test_refusals_of_the_hopper_kernel(change, message):
    """By name, with what is allowed."""
    reason = refusals("attention").get("sm90")
    if reason:
        pytest.skip(f"sm90: {reason}")
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", torch.bfloat16)
    flat = torch.zeros(200 * 2 * head_dim + 8, device="cuda", dtype=dtype)
    q = flat[change.get("offset", 0) :][: 200 * 2 * head_dim].view(1, 200, 2, head_dim)
    k = torch.zeros(1, 200, 2, head_dim, device="cuda", dtype=dtype)
    if change.get("expand"):
        k = k[:, :, :1].expand(-1, -1, 2, -1)
    grid = Grid(200, 200, block_m=change.get("block_m", 128), block_n=change.get("block_n", 128))
    symbols = Symbols.dense(grid, 1, 2, "cuda")
    with pytest.raises(NotImplementedError, match=message):
        sparse_attention(q, k, k, symbols, softmax_scale=change.get("scale"), backend="sm90")
