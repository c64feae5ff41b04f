"""The anchored softmax of the portable kernel: right where it stands, redone online where not.

Without a GPU ``TRITON_INTERPRET=1 pytest -k portable`` runs it in Triton's interpreter, in fp32.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from adversarial import CASES, attention_inputs
from conftest import device_for, random_symbols, token_masks
from flashomni.kernels import sparse_attention
from flashomni.kernels.attention import portable as attention
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import Config
from flashomni.symbols import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(bool(portable.available()), reason="; ".join(portable.available())),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's: they overflow on purpose
]
DEVICE = device_for("portable")
# Triton's interpreter multiplies no bf16.
DTYPES = [torch.float32] if portable.INTERPRETED else [torch.float32, torch.bfloat16]
HEAD_DIM, BLOCK = 16, 32
TILE = Config(BLOCK, BLOCK, HEAD_DIM, 4, 2)


def run(q, k, v, symbols=None, kv_len=None, *, anchored=True, scale=HEAD_DIM**-0.5):
    """``(out, lse, tiles done again)``; outputs are poisoned with 7."""
    out = torch.full_like(q, 7.0)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 7.0, device=q.device)
    redone = torch.zeros(4, dtype=torch.int32, device=q.device)
    call = AttentionCall(q, k, v, out, lse, symbols, kv_len, scale, None, not anchored, redone)
    attention.launch(call, TILE._replace(anchored=True))
    return out, lse, int(redone[0])


def defined(q, k, v, symbols=None, kv_len=None):
    """The definition, of the same values in fp32."""
    out = torch.full_like(q, 7.0, dtype=torch.float32)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 7.0, device=q.device)
    q, k, v = q.float(), k.float(), v.float()
    sparse_attention(q, k, v, symbols, out=out, lse=lse, kv_len=kv_len, backend="reference")
    return out, lse


def is_redone(kind, amount):
    """Whether a tile that visits all keys, the first ones first, must be done again."""
    if kind in ("rise", "sink last"):
        return amount > 90  # a sum of 2**96 is 67 nats
    return kind == "nan"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "amount"), CASES, ids=str)
def test_one_tile(kind, amount, dtype):
    """Done again: the bits of the online softmax. Otherwise as near to the definition as that."""
    shape = (1, BLOCK, 8 * BLOCK + 3, 1, 1, HEAD_DIM)
    q, k, v = attention_inputs(kind, amount, shape, HEAD_DIM**-0.5, dtype, DEVICE)
    out, lse, count = run(q, k, v)
    online, online_lse, none = run(q, k, v, anchored=False)
    assert none == 0
    if is_redone(kind, amount):
        assert count == 1
    elif kind not in ("rise", "sink last", "gain"):
        assert count == 0
    if count:
        torch.testing.assert_close(out, online, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(lse, online_lse, rtol=0, atol=0, equal_nan=True)
        return
    exact, exact_lse = defined(q, k, v)
    eps = torch.finfo(dtype).eps
    floor = max(eps, 1e-5) * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (online - exact).abs().max() + floor
    torch.testing.assert_close(lse, exact_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_tiles_that_overflow_are_done_again(dtype):
    """One head of two has the sink; with symbols those tiles that visit it after another block."""
    grid = Grid(5 * BLOCK - 7, 6 * BLOCK - 5, block_m=BLOCK, block_n=BLOCK)
    shape = (2, grid.seqlen_q, grid.seqlen_kv, 2, 2, HEAD_DIM)
    sink = attention_inputs("sink last", 120.0, shape, HEAD_DIM**-0.5, dtype, DEVICE)
    plain = attention_inputs("gain", 1.0, shape, HEAD_DIM**-0.5, dtype, DEVICE)
    q, k, v = (torch.cat([a[:, :, :1], b[:, :, 1:]], 2) for a, b in zip(sink, plain, strict=True))
    symbols = random_symbols(grid, 2, 2).to(DEVICE)
    out, lse, count = run(q, k, v, symbols)
    online, online_lse, _ = run(q, k, v, symbols, anchored=False)
    visits = symbols.kv_mask() & symbols.q_mask()[..., None]
    again = visits[..., -1] & visits[..., :-1].any(-1)
    again[:, 1] = False
    assert 0 < count == int(again.sum()) < int(symbols.q_mask().sum())
    rows = again.repeat_interleave(BLOCK, -1)[..., : grid.seqlen_q]
    assert torch.equal(out[rows.mT], online[rows.mT]) and torch.equal(lse[rows], online_lse[rows])
    computed, _ = token_masks(symbols)
    assert (out[~computed.mT] == 7).all() and (lse[~computed] == 7).all()
    exact, exact_lse = defined(q, k, v, symbols)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, exact_lse, atol=1e-3, rtol=1e-5)


def test_no_length_makes_a_tile_begin_with_nothing():
    """From no valid key to one block and three: nothing is done again, rows without keys are 0."""
    shape = (1, 9, 2 * BLOCK + 5, 1, 1, HEAD_DIM)
    q, k, v = attention_inputs("gain", 4.0, shape, HEAD_DIM**-0.5, torch.float32, DEVICE)
    for length in range(BLOCK + 4):
        kv_len = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        out, lse, count = run(q, k, v, kv_len=kv_len)
        exact, exact_lse = defined(q, k, v, kv_len=kv_len)
        assert count == 0
        torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse, exact_lse, atol=1e-4, rtol=1e-5)
        if length == 0:
            assert (out == 0).all() and (lse == -math.inf).all()


def test_fp16_stays_online():
    """Its largest number is 65504: nothing far above the first visit fits."""
    shape = (1, BLOCK, 4 * BLOCK, 1, 1, HEAD_DIM)
    q, k, v = attention_inputs("rise", 150.0, shape, HEAD_DIM**-0.5, torch.float16, DEVICE)
    out, lse, count = run(q, k, v)
    online, online_lse, _ = run(q, k, v, anchored=False)
    assert count == 0 and torch.equal(out, online) and torch.equal(lse, online_lse)
