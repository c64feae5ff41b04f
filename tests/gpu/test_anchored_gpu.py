"""The anchored softmax on a GPU: what could be wrong is done again, and equals the online build."""

import math

import pytest
import torch

from conftest import random_symbols
from flashomni.kernels import refusals, sparse_attention
from flashomni.kernels.attention.op import ForecastTerms
from flashomni.symbols import Grid

pytestmark = pytest.mark.gpu

POISON = 7.0
SEQLEN, HEADS = 1200, 2
TILES = HEADS * -(-SEQLEN // 128)


@pytest.fixture(autouse=True)
def hopper():
    reason = refusals("attention").get("sm90")
    if reason:
        pytest.skip(f"sm90: {reason}")


def hard(kind, head_dim=128, seqlen=SEQLEN):
    """q, k, v whose logits do what ``kind`` says; blocks of keys are visited from the last one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, seqlen, HEADS, head_dim, device="cuda")
    axis = torch.randn(head_dim, device="cuda")
    axis /= axis.norm()
    nat = axis / 8 * math.sqrt(head_dim)  # of a key: one nat more for each query below
    along = torch.linspace(0, 1, seqlen, device="cuda")[None, :, None, None]
    if kind in ("rise", "fall", "sink", "sink visited first", "rise a little"):
        q = q * 0.3 + axis * 8
    match kind:
        case "rise":  # in the order of visits
            k = k * 0.3 + (1 - along) * 400 * nat
        case "rise a little":
            k = k * 0.3 + (1 - along) * 30 * nat
        case "fall":
            k = k * 0.3 + along * 400 * nat
        case "sink":
            k[:, 5] = 60 * nat
        case "sink visited first":
            k[:, -5] = 300 * nat
        case "self":
            q = k * 8
        case "gain":
            q = q * 12
        case "equal":
            k = k[:, :1].expand_as(k)
        case "large values":
            v = v * 2.0**30
        case "small values":
            v = v * 2.0**-100
        case "huge values":
            v, k = v * 2.0**120, k + (1 - along) * 12 * nat
        case "nan":
            k[:, 700, 0, 0] = float("nan")
        case "minus infinity":
            k[:, 700, 0, 0] = -float("inf")
    return [x.to(torch.bfloat16).contiguous() for x in (q, k, v)]


def run(q, k, v, symbols=None, online=False, **kwargs):
    out = torch.full_like(q, POISON)
    lse = torch.full((1, q.shape[2], q.shape[1]), POISON, device="cuda")
    redone = torch.zeros(4, dtype=torch.int32, device="cuda")
    sparse_attention(
        q, k, v, symbols, out=out, lse=lse, online=online, redone=redone, backend="sm90", **kwargs
    )
    return out, lse, int(redone[0])


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_overflowing_tiles_are_those_of_the_online_softmax(head_dim, density):
    """Bit for bit, with their LSE; cached rows keep what they held."""
    q, k, v = hard("rise", head_dim)
    symbols = None
    if density < 1:
        symbols = random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 0.7, density).to("cuda")
    out, lse, redone = run(q, k, v, symbols)
    want, want_lse, none = run(q, k, v, symbols, online=True)
    assert none == 0
    live = TILES if symbols is None else int(symbols.q_mask().sum())
    assert 0.8 * live <= redone <= live
    same = (out == want).all(-1).transpose(1, 2) & (lse == want_lse)
    assert same.float().mean() >= redone / live
    if redone == live:
        assert same.all()
    if symbols is not None:
        cached = ~symbols.q_mask().repeat_interleave(128, -1)[..., :SEQLEN]
        assert (out.transpose(1, 2)[cached] == POISON).all() and (lse[cached] == POISON).all()


@pytest.mark.parametrize("seqlen_kv", [300, 384])
def test_no_tile_is_done_again_for_any_number_of_valid_keys(seqlen_kv):
    """The first visit holds a valid key, whatever kv_len."""
    torch.manual_seed(1)
    q = torch.randn(1, 150, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, seqlen_kv, 1, 128, device="cuda", dtype=torch.bfloat16)
    redone = torch.zeros(4, dtype=torch.int32, device="cuda")
    symbols = random_symbols(Grid(150, seqlen_kv), 1, 1, 1.0, 0.6).to("cuda")
    for length in range(seqlen_kv + 1):
        kv_len = torch.tensor([length], dtype=torch.int32, device="cuda")
        for bits in (None, symbols):
            sparse_attention(q, k, v, bits, kv_len=kv_len, redone=redone, backend="sm90")
    assert int(redone[0]) == 0


@pytest.mark.parametrize(
    "kind",
    ["rise", "rise a little", "fall", "sink", "sink visited first", "self", "gain", "equal",
     "large values", "small values", "huge values"],
)  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hard_inputs_keep_twice_the_error_of_torch(kind, head_dim):
    """The largest error of an element, against fp32; with all keys and with few."""
    q, k, v = hard(kind, head_dim)
    for symbols in (None, random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 1.0, 0.5).to("cuda")):
        exact = torch.empty(q.shape, device="cuda")
        exact_lse = torch.empty(1, HEADS, SEQLEN, device="cuda")
        sparse_attention(
            q.float(), k.float(), v.float(), symbols, out=exact, lse=exact_lse,
            backend="reference",
        )  # fmt: skip
        mask = None
        if symbols is not None:
            mask = symbols.kv_mask().repeat_interleave(128, -1).repeat_interleave(128, -2)
            mask = mask[..., :SEQLEN, :SEQLEN]
        stock = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
        ).transpose(1, 2)
        out, lse, _ = run(q, k, v, symbols)
        size = exact.abs().max()
        ulp = 2.0**-9 * size  # half of a last place of the largest output
        error, allowed = (out - exact).abs().max(), 2 * (stock - exact).abs().max()
        assert error <= torch.maximum(allowed, ulp)
        torch.testing.assert_close(lse, exact_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["nan", "minus infinity"])
def test_what_is_not_a_number_is_where_the_definition_has_it(kind):
    """A key that is not a number spoils the rows that visit it, and no other."""
    q, k, v = hard(kind)
    symbols = random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 1.0, 0.5).to("cuda")
    out, _, redone = run(q, k, v, symbols)
    want, _, _ = run(q, k, v, symbols, online=True)
    assert redone > 0
    assert torch.equal(out.isfinite(), want.isfinite()) and not out.isfinite().all()


def test_calls_that_do_much_again_go_online():
    """After three in a row; calm calls in between start the count anew; all on the device."""
    calm, wild = hard("gain"), hard("rise")
    redone = torch.zeros(4, dtype=torch.int32, device="cuda")

    def call(inputs):
        before = int(redone[0])
        out = torch.full_like(inputs[0], POISON)
        sparse_attention(*inputs, out=out, redone=redone, backend="sm90")
        return out, int(redone[0]) - before

    for inputs in (wild, wild, calm, wild, wild):
        assert (call(inputs)[1] > TILES / 10) == (inputs is wild)
    out, again = call(calm)
    anchored = run(*calm)[0]
    assert again == 0 and torch.equal(out, anchored)
    for _ in range(3):
        assert call(wild)[1] > TILES / 10
    for inputs in (calm, wild, calm):
        out, again = call(inputs)
        assert again == 0 and torch.equal(out, run(*inputs, online=True)[0])
    assert not torch.equal(anchored, run(*calm, online=True)[0])


def test_forecast_rows_are_written_once():
    """Tiles that are done again lie beside forecast ones, which keep their forecast."""
    q, k, v = hard("rise")
    symbols = random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 0.6, 0.5).to("cuda")
    terms = torch.randn(2, 1, SEQLEN, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    weights = torch.tensor([1.0, 0.5], device="cuda")
    out, _, redone = run(q, k, v, symbols, forecast=ForecastTerms(list(terms), weights))
    assert redone > 0
    cached = ~symbols.q_mask().repeat_interleave(128, -1)[..., :SEQLEN].transpose(1, 2)
    want = (terms[0].float() + 0.5 * terms[1].float()).to(torch.bfloat16)
    assert torch.equal(out[cached], want[cached])


def test_a_graph_replays_on_data_that_overflows():
    """Captured on calm data; nothing of what was found then is kept."""
    q, k, v = hard("gain")
    symbols = random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 0.8, 0.5).to("cuda")
    out = torch.full_like(q, POISON)
    redone = torch.zeros(4, dtype=torch.int32, device="cuda")

    def call():
        sparse_attention(q, k, v, symbols, out=out, redone=redone, backend="sm90")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for kind in ("rise", "gain", "rise"):
        for tensor, new in zip((q, k, v), hard(kind), strict=True):
            tensor.copy_(new)
        want, _, count = run(q, k, v, symbols)
        out.fill_(POISON)
        redone.zero_()
        graph.replay()
        assert torch.equal(out, want) and int(redone[0]) == count
        assert (count > 0) == (kind == "rise")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rings_of_other_depths_give_the_same_bits(head_dim):
    """How many tiles are under way is a matter of speed alone."""
    from dataclasses import replace

    from flashomni.kernels.attention.op import AttentionCall
    from flashomni.kernels.attention.sm90 import choose_config, launch

    q, k, v = hard("gain", head_dim)
    symbols = random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 0.7, 0.4).to("cuda")
    for bits in (symbols, None):
        outs = []
        for q_stages, k_stages, v_stages in ((2, 2, 2), (1, 2, 2), (1, 3, 2), (1, 2, 3)):
            config = replace(
                choose_config(head_dim, 128),
                q_stages=q_stages, k_stages=k_stages, v_stages=v_stages,
            )  # fmt: skip
            outs.append(torch.full_like(q, POISON))
            launch(AttentionCall(q, k, v, outs[-1], None, bits, None, head_dim**-0.5), config)
        assert all(torch.equal(out, outs[0]) for out in outs)
