"""Code written for the authors' package: same names, same packing, their README's snippet."""

import importlib
import inspect
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from compat_cases import close, gpu, int32, numpy_packed
from torch.nn.functional import linear, scaled_dot_product_attention

import flashomni
from conftest import random_symbols
from flashomni.compat import from_packed, to_packed
from flashomni.symbols import Grid

Wrapper = flashomni.BatchFlashOmniFAWithRaggedKVWrapper


def test_the_names_are_found_where_the_authors_have_them():
    """In the package and in ``flashomni.attention``; the package shows its own names only."""
    module = importlib.import_module("flashomni.attention")
    assert flashomni.attention is module
    assert flashomni.BatchFlashOmniFAWithRaggedKVWrapper is Wrapper
    for name in ("flashomni_gemm", "flashomni_gemm_reduction", "packbits", "segment_packbits"):
        assert getattr(flashomni, name) is getattr(flashomni.compat, name)
        assert name not in flashomni.__all__ and name not in dir(flashomni)
    with pytest.raises(AttributeError, match="'flashomni' has no attribute 'flash_omni'"):
        _ = flashomni.flash_omni


@pytest.mark.slow
def test_the_names_are_loaded_on_first_use():
    """``import flashomni`` alone loads nothing of them."""
    code = "import sys, flashomni; sys.exit('flashomni.compat' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("call", "signature"),
    [
        (
            Wrapper,
            "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False qo_indptr_buf=None "
            "kv_indptr_buf=None custom_mask_buf=None mask_indptr_buf=None backend='auto'",
        ),
        (
            Wrapper.plan,
            "self qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk "
            "sparse_block_size_for_q=128 sparse_block_size_for_kv=128 head_dim_vo=None "
            "custom_mask=None packed_custom_mask=None causal=False pos_encoding_mode='NONE' "
            "use_fp16_qk_reduction=False logits_soft_cap=None sm_scale=None rope_scale=None "
            "rope_theta=None q_data_type='float16' kv_data_type=None",
        ),
        (
            Wrapper.run,
            "self q k v sparse_info=None sparse_kv_info=None sparse_info_indptr=None "
            "sparse_kv_info_indptr=None is_full=False args out=None lse=None return_lse=False",
        ),
        (
            flashomni.flashomni_gemm,
            "A B num_qo_heads sparse_info=None sparse_info_indptr=None num_text_tokens=512 "
            "bias=None out=None sparse_q_size=128 is_full=False",
        ),
        (
            flashomni.flashomni_gemm_reduction,
            "A B num_qo_heads sparse_info sparse_info_indptr num_text_tokens bias=None "
            "is_for_cache=False sparse_q_size=128",
        ),
        (flashomni.packbits, "x bitorder='big'"),
        (flashomni.segment_packbits, "x indptr bitorder='big'"),
    ],
)
def test_arguments_and_defaults_are_the_authors(call, signature):
    """Order, names and defaults; ours come after theirs, by keyword only."""
    found = [
        parameter.name + ("" if parameter.default is parameter.empty else f"={parameter.default!r}")
        for parameter in inspect.signature(call).parameters.values()
        if parameter.name != "backend" or parameter.kind is not parameter.KEYWORD_ONLY
    ]
    assert " ".join(found) == signature


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 1000])
def test_packbits_is_numpys(bitorder, length):
    """For flags of any dtype."""
    flags = torch.rand(length) < 0.5
    expected = np.packbits(flags.numpy(), bitorder=bitorder)
    for x in (flags, flags.to(torch.uint8), flags.float() * -0.5):
        packed = flashomni.packbits(x, bitorder)
        assert packed.dtype == torch.uint8
        np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(flashomni.packbits(flags).numpy(), np.packbits(flags.numpy()))


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segment_packbits_packs_each_request(bitorder, dtype):
    """Requests of no flags, of part of a byte and of several; flags before and after are left."""
    flags = torch.rand(60) < 0.5
    ends = [3, 3, 4, 12, 29, 29, 54]
    packed, indptr = flashomni.segment_packbits(flags, torch.tensor(ends, dtype=dtype), bitorder)
    rows = [np.packbits(flags[a:b].numpy(), bitorder=bitorder) for a, b in pairwise(ends)]
    np.testing.assert_array_equal(packed.numpy(), np.concatenate(rows))
    assert indptr.dtype == torch.int32
    assert indptr.tolist() == [0, 0, 1, 2, 5, 5, 9]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 200, 330), (2, 24, 1300, 700)], ids=str)
def test_symbols_survive_the_round_trip(shape):
    """And the bytes are those of numpy: heads run faster than blocks, rows are not aligned."""
    batch, heads, seqlen_q, seqlen_kv = shape
    grid = Grid(seqlen_q, seqlen_kv, block_m=64, block_n=16)
    symbols = random_symbols(grid, batch, heads)
    packed = to_packed(symbols)
    for bits, indptr, mask in (
        (packed[0], packed[2], symbols.q_mask()),
        (packed[1], packed[3], symbols.kv_mask()),
    ):
        expected, expected_indptr = numpy_packed(list(mask.transpose(1, 2)))
        assert torch.equal(bits, expected) and torch.equal(indptr, expected_indptr)
    back = from_packed(*packed, grid, heads)
    assert torch.equal(back.q_bits, symbols.q_bits) and torch.equal(back.kv_bits, symbols.kv_bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, r"x must be \[n\], got \[2, 8\]"),
        ({"bitorder": "middle"}, "bitorder must be 'big' or 'little', got 'middle'"),
        ({"indptr": torch.zeros(3)}, "indptr must be int32 or int64"),
        ({"indptr": int32(0, 9, 8)}, "indptr must ascend"),
        ({"indptr": int32(0, 8, 17)}, "indptr must lie within the 16 flags of x"),
        ({"indptr": int32(-1, 8, 16)}, "indptr must lie within the 16 flags of x"),
    ],
)
def test_flags_are_checked(change, message):
    """What was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        flashomni.segment_packbits(
            **{"x": torch.zeros(16), "indptr": int32(0, 8, 16), "bitorder": "big", **change}
        )


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=gpu)],
)
def test_the_authors_snippet_runs(device, dtype):
    """Plan, attention, GEMM-Q, both passes of GEMM-O: their calls in their order."""
    torch.manual_seed(42)
    batch, seqlen, text, num_heads, head_dim, block = 2, 640, 128, 4, 64, 128
    width, vision = num_heads * head_dim, seqlen - text
    workspace_buffer = torch.empty(1024, dtype=torch.int8, device=device)
    indptr = torch.arange(0, batch + 1, device=device, dtype=torch.int32) * seqlen
    wrapper = flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper(workspace_buffer, "NHD")
    wrapper.plan(
        indptr,
        indptr,
        num_heads,
        num_heads,
        head_dim,
        causal=False,
        pos_encoding_mode="NONE",
        logits_soft_cap=0.0,
        q_data_type=dtype,
        sparse_block_size_for_q=block,
        sparse_block_size_for_kv=block,
    )
    count = seqlen // block
    S_c = torch.rand(batch, count, num_heads, device=device) < 0.6
    S_c[:, : text // block] = True
    S_s = torch.rand(batch, count, num_heads, count, device=device) < 0.5
    S_s[..., 0] = True
    S_s &= S_c[..., None]  # as their benchmark does
    sparse_info, sparse_info_indptr = flashomni.segment_packbits(
        S_c.to(torch.uint8).view(-1), wrapper._sparse_info_indptr_base, bitorder="little"
    )
    sparse_kv_info, sparse_kv_info_indptr = flashomni.segment_packbits(
        S_s.to(torch.uint8).view(-1), wrapper._sparse_kv_info_indptr_base, bitorder="little"
    )

    x = torch.randn(batch, vision, width, dtype=dtype, device=device)
    k, v, text_q = torch.randn(3, batch, seqlen, num_heads, head_dim, dtype=dtype, device=device)
    to_q, to_out = (torch.nn.Linear(width, width, dtype=dtype, device=device) for _ in range(2))
    with torch.no_grad():
        q = flashomni.flashomni_gemm(
            x, to_q.weight, num_heads, sparse_info, sparse_info_indptr, text, to_q.bias
        )
        q = torch.cat([text_q[:, :text], q.view(batch, vision, num_heads, head_dim)], 1)
        flat = [part.reshape(batch * seqlen, num_heads, head_dim) for part in (q, k, v)]
        o = wrapper.run(
            *flat, sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr
        )
        o = o.view(batch, seqlen, width)[:, text:]
        bias = flashomni.flashomni_gemm_reduction(
            o,
            to_out.weight,
            num_heads,
            sparse_info,
            sparse_info_indptr,
            text,
            to_out.bias,
            is_for_cache=True,
        )
        y = flashomni.flashomni_gemm_reduction(
            o,
            to_out.weight,
            num_heads,
            sparse_info,
            sparse_info_indptr,
            text,
            bias=bias,
            is_for_cache=False,
        )

        def dense(dtype):
            live = S_c.repeat_interleave(block, 1)[..., None]  # [B, S, H, 1]
            pairs = S_s.permute(0, 2, 1, 3).repeat_interleave(block, 2).repeat_interleave(block, 3)
            q = linear(x.to(dtype), to_q.weight.to(dtype), to_q.bias.to(dtype))
            q = torch.cat([text_q[:, :text].to(dtype), q.unflatten(-1, (num_heads, -1))], 1)
            heads = (part.to(dtype).transpose(1, 2) for part in (q, k, v))
            pairs = pairs | ~live.transpose(1, 2)  # cached rows: anything finite
            o = scaled_dot_product_attention(*heads, attn_mask=pairs).transpose(1, 2)
            o = o.masked_fill(~live, 0.0)[:, text:].flatten(2)
            return linear(o, to_out.weight.to(dtype), to_out.bias.to(dtype))

        close(y, dense(torch.float64), dense(dtype))
