"""Summaries on a GPU: every size and dtype, the anchored softmax among them."""

from dataclasses import replace

import pytest
import torch

from attention_cases import PLAIN, attend, draw, make, token_masks
from attention_faults import graph_faults, verdict
from conftest import refusal_skips, with_gpu_marks
from flashomni.kernels import Summary, backends, refresh, sparse_attention, summarise
from flashomni.symbols import Grid, Symbols

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
BACKENDS = with_gpu_marks(["sm90", "portable"])
# Ragged on purpose: (seqlen_q, seqlen_kv), the last with more blocks than a word has bits.
SIZES = [(1, 1), (129, 127), (300, 1290), (700, 4608), (257, 4301)]


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 comparisons without TF32, and without cuDNN's attention, which failed at times."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cuda.enable_cudnn_sdp(True)


def case(number=0, **changes):
    """One call with summaries; what is not named is plain."""
    usual = {
        "number": number, "dtype": torch.bfloat16, "batch": 1, "seqlen_q": 700, "seqlen_kv": 4608,
        "kv_heads": 2, "ratio": 1, "head_dim": 128, "block_n": 128, "layout": "separate",
        "symbols": "each", "has_kv_len": False, "has_lse": True, "q_density": 0.7,
        "kv_density": 0.3, "terms": 0, "kind": PLAIN[0], "amount": PLAIN[1], "per_block": 4,
    }  # fmt: skip
    usual |= changes
    return replace(draw(0), scale=usual["head_dim"] ** -0.5, **usual)


def check(which, backend, repeats=1):
    with refusal_skips():
        found = verdict(which, backend, CUDA, repeats)
    assert not found.wrong, f"{found.wrong} {which}"
    return found


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "per_block"),
    [
        (BF16, 64, 4), (BF16, 80, 16), (BF16, 96, 1), (BF16, 128, 1), (BF16, 128, 4),
        (BF16, 128, 16), (BF16, 256, 4), (FP16, 64, 1), (FP16, 128, 4),
    ],
)  # fmt: skip
def test_every_size(backend, dtype, head_dim, per_block):
    """At most twice the error of torch; ragged sizes, GQA, kv_len at odd places, hollow rows."""
    for number, (seqlen_q, seqlen_kv) in enumerate(SIZES):
        which = case(
            number, dtype=dtype, head_dim=head_dim, per_block=per_block, seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv, batch=2, ratio=1 + number % 2, has_kv_len=True,
            symbols="holes" if number == 3 else "each", layout="fused",
        )  # fmt: skip
        check(which, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("block_n", "per_block"), [(64, 1), (64, 4), (64, 32), (128, 2), (128, 64), (256, 8)]
)
def test_other_blocks(backend, block_n, per_block):
    """Several tiles a block, and a tile of many words or of part of one; repeats are equal.

    Where most blocks are live some tiles of summaries are of live blocks alone.
    """
    for density in (0.0, 0.4, 0.95, 1.0):
        check(case(7, block_n=block_n, per_block=per_block, kv_density=density), backend, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 31, 127, 128, 129, 1000, 4095, 4096, 4097, 4608])
def test_any_number_of_valid_keys(backend, length):
    """Summaries count valid keys alone; where all visited blocks lie behind, they are all."""
    which = case(length, kv_density=0.1)
    x = make(which, CUDA)
    kv_len = torch.tensor([length], dtype=torch.int32, device=CUDA)
    summary = summarise(x.k, x.v, x.symbols.grid, 4, kv_len=kv_len)
    want = summarise(x.k, x.v, x.symbols.grid, 4, kv_len=kv_len, backend="reference")
    for mine, theirs in zip(
        (summary.k, summary.v, summary.log_n), (want.k, want.v, want.log_n), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    x = replace(x, kv_len=kv_len, summary=want)
    out, exact = torch.full_like(x.q, 7.0), torch.full_like(x.q, 7.0)
    with refusal_skips():
        attend(which, x, backend, out)
    attend(which, x, "reference", exact)
    rows, _ = token_masks(which, x)
    live = rows.mT
    torch.testing.assert_close(out[live], exact[live], atol=4e-3, rtol=2e-2)
    assert (out[~live] == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "amount", "is_redone"),
    [
        ("rise", 20.0, False), ("rise", 400.0, None), ("fall", 400.0, True), ("gain", 12.0, False),
        ("sink first", 400.0, True), ("sink last", 120.0, None), ("equal", 1.0, False),
        ("values", 2.0**30, False), ("minus infinity", 1.0, None), ("nan", 1.0, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hard_inputs(backend, head_dim, kind, amount, is_redone):
    """Summaries far above the first visit too: tiles that overflow are done again."""
    found = check(
        case(3, kind=kind, amount=amount, head_dim=head_dim, q_density=1.0), backend, repeats=2
    )
    if is_redone is not None and backend == "sm90":
        assert (found.redone > 0) == is_redone


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_done_again_are_those_of_the_online_softmax(head_dim):
    """Bit for bit; it is the summaries alone that make them overflow."""
    which = case(5, head_dim=head_dim, q_density=1.0, kv_density=0.2)
    x = make(which, CUDA)
    loud = Summary(x.summary.k * 1000, x.summary.v, x.summary.log_n)
    outs = []
    for online in (False, True):
        out, redone = torch.full_like(x.q, 7.0), torch.zeros(4, dtype=torch.int32, device=CUDA)
        with refusal_skips():
            sparse_attention(
                x.q, x.k, x.v, x.symbols, out=out, summary=loud, online=online, redone=redone,
                backend="sm90",
            )  # fmt: skip
        outs.append(out)
        assert (int(redone[0]) > 0) != online
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_block(backend):
    """No bit of S_s is set, and the first summaries stand for nothing."""
    which = case(6, q_density=0.8)
    x = make(which, CUDA)
    log_n = x.summary.log_n.clone()
    log_n[:, :130] = -torch.inf
    empty = Symbols(x.symbols.q_bits, torch.zeros_like(x.symbols.kv_bits), x.symbols.grid)
    live = token_masks(which, x)[0].mT
    for weights in (log_n, torch.full_like(log_n, -torch.inf)):
        x = replace(x, symbols=empty, summary=Summary(x.summary.k, x.summary.v, weights))
        got = {}
        for name in (backend, "reference"):
            out, lse = torch.full_like(x.q, 7.0), torch.full(live.mT.shape, 7.0, device=CUDA)
            with refusal_skips():
                attend(which, x, name, out, lse)
            got[name] = out, lse
        torch.testing.assert_close(*(one[0] for one in got.values()), atol=4e-3, rtol=2e-2)
        torch.testing.assert_close(*(one[1] for one in got.values()), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_replay_on_data_that_overflows(backend):
    """Captured on plain data; nothing of what was found then is kept."""
    with refusal_skips():
        assert not graph_faults(case(9), backend, CUDA)


@pytest.mark.parametrize("backend", with_gpu_marks(["sm90"]))
@pytest.mark.parametrize(
    ("dtype", "block_n", "per_block"),
    [(BF16, 128, 0), (BF16, 128, 1), (BF16, 128, 2), (BF16, 128, 16), (BF16, 64, 4),
     (FP16, 128, 16)],
)  # fmt: skip
def test_many_tiles_a_program(backend, dtype, block_n, per_block):
    """Rings and messages go round more than once, and a tile that miscounts harms the next.

    Rows that visit all blocks, none, and those of whole tiles of summaries; attention and refresh.
    """
    seqlen_q, seqlen_kv, heads = 64 * 128 - 5, 2100, 8
    generator = torch.Generator(CUDA).manual_seed(per_block)
    q, k, v = (
        torch.randn(2, n, heads, 128, device=CUDA, generator=generator).to(dtype)
        for n in (seqlen_q, seqlen_kv, seqlen_kv)
    )
    kv_len = torch.tensor([seqlen_kv, 1999], dtype=torch.int32, device=CUDA)
    grid = Grid(seqlen_q, seqlen_kv, block_n=block_n, kv_len=kv_len)
    shape = (2, heads, grid.num_q_blocks, grid.num_kv_blocks)
    draws = torch.rand(shape, device=CUDA, generator=generator)
    row = torch.arange(grid.num_q_blocks, device=CUDA)[:, None]
    whole = torch.arange(grid.num_kv_blocks, device=CUDA) // 8 % 2 == row % 2
    density = torch.tensor([0.0, 0.3, 0.5, 0.95, 1.1], device=CUDA)[row % 5]
    symbols = Symbols.pack(draws[..., 0] < 2, (draws < density) | (whole & (row % 5 == 2)), grid)
    summary = summarise(k, v, grid, per_block) if per_block else None
    got, want = {}, {}
    for name, found in (("sm90", got), ("reference", want)):
        out, lse = torch.full_like(q, 7.0), torch.full((2, heads, seqlen_q), 7.0, device=CUDA)
        options = {"summary": summary, "backend": name}
        with refusal_skips():
            sparse_attention(q, k, v, symbols, out=out, lse=lse, **options)
            sparse, missed = refresh(q, k, v, symbols, **options)
        found |= {"out": out, "lse": lse, "sparse": sparse, "dense": sparse.float() + missed}
    for name in ("out", "sparse", "dense"):
        torch.testing.assert_close(got[name], want[name], atol=8e-3, rtol=2e-2)
    torch.testing.assert_close(got["lse"], want["lse"], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(got["sparse"], got["out"], atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize("backend", backends("summarise"))
@pytest.mark.parametrize("per_block", [1, 4, 16])
def test_making_them_at_full_size(backend, per_block):
    """33,000 tokens in a fused tensor of 24 heads."""
    if backend == "cpu":
        pytest.skip("not for a GPU")
    which = case(0, seqlen_q=128, seqlen_kv=33000, kv_heads=24, layout="fused", symbols="shared")
    x = make(which, CUDA)
    kv_len = torch.tensor([32777], dtype=torch.int32, device=CUDA)
    got = summarise(x.k, x.v, x.symbols.grid, per_block, kv_len=kv_len, backend=backend)
    want = summarise(x.k, x.v, x.symbols.grid, per_block, kv_len=kv_len, backend="reference")
    for mine, theirs in zip((got.k, got.v, got.log_n), (want.k, want.v, want.log_n), strict=True):
        torch.testing.assert_close(mine, theirs)
