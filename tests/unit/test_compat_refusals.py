"""What the authors' attention wrapper refuses here, and how it says so."""

import pytest
import torch
from compat_cases import int32

import flashomni
from flashomni.kernels import backends

Wrapper = flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper


def small(**options):
    wrapper = Wrapper(torch.empty(1))
    indptr = torch.tensor([0, 40, 100], dtype=torch.int32)
    heads = {"num_qo_heads": 2, "num_kv_heads": 2, "head_dim_qk": 32, "q_data_type": "float32"}
    wrapper.plan(**{"qo_indptr": indptr, "kv_indptr": indptr, **heads, **options})
    return wrapper


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_layout": "DHN"}, "kv_layout must be 'NHD' or 'HND', got 'DHN'"),
        ({"backend": "abacus"}, "backend must be one of auto, .*fa2.* got 'abacus'"),
        ({"qo_indptr": torch.zeros(3)}, "qo_indptr must be int32 or int64, got float32"),
        ({"qo_indptr": int32(0)}, r"qo_indptr must be \[B \+ 1\]"),
        ({"qo_indptr": int32(1, 40, 100)}, "qo_indptr must start at 0, got 1"),
        ({"kv_indptr": int32(0, 40, 30)}, r"kv_indptr must ascend, got \[0, 40, 30\]"),
        ({"kv_indptr": int32(0, 40)}, r"kv_indptr must be \[3\], got \[2\]"),
        ({"kv_indptr": int32(0, 40, 40)}, "kv_indptr must give .* a key, got none for request 1"),
        ({"num_kv_heads": 3}, "num_qo_heads must be .* multiple of num_kv_heads=3, got 2"),
        ({"sparse_block_size_for_q": 100}, "sparse_block_size_for_q must be .* 16, got 100"),
        ({"sparse_block_size_for_kv": 0}, "sparse_block_size_for_kv must be .* 16, got 0"),
        ({"pos_encoding_mode": "COPE"}, "pos_encoding_mode must be one of NONE.* got 'COPE'"),
        ({"sm_scale": float("inf")}, "sm_scale must be finite, got inf"),
        ({"q_data_type": "half precision"}, "q_data_type must be a torch.dtype .*got 'half"),
    ],
)
def test_plans_are_checked(change, message):
    """What was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        if {"kv_layout", "backend"} & set(change):
            Wrapper(torch.empty(1), **change)
        small(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"custom_mask": torch.ones(4)},
        {"packed_custom_mask": torch.ones(4)},
        {"causal": True},
        {"pos_encoding_mode": "ROPE_LLAMA"},
        {"pos_encoding_mode": "ALIBI"},
        {"use_fp16_qk_reduction": True},
        {"logits_soft_cap": 30.0},
        {"rope_scale": 2.0},
        {"rope_theta": 5e5},
        {"head_dim_vo": 64},
        {"kv_data_type": torch.float16},
        {"q_data_type": torch.float8_e4m3fn},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_supported_is_refused_by_name(change):
    """Never ignored."""
    (name,) = change
    with pytest.raises(NotImplementedError, match=f"^{name} "):
        small(**change)


def test_options_that_change_nothing_are_taken():
    """The authors' own defaults, spelled out."""
    small(
        logits_soft_cap=0.0,
        rope_scale=1.0,
        rope_theta=1e4,
        head_dim_vo=32,
        causal=False,
        kv_data_type="float32",
        sm_scale=32**-0.5,
    )


def test_masks_and_missing_backends_are_refused_by_the_constructor():
    """fa3 is the generation of our sm90; where that cannot run, nothing else takes its place."""
    for name in ("custom_mask_buf", "mask_indptr_buf"):
        with pytest.raises(NotImplementedError, match=name):
            Wrapper(torch.empty(1), **{name: torch.empty(4)})
    for theirs, ours in (("fa2", "portable"), ("fa3", "sm90")):
        if ours not in backends("attention"):
            with pytest.raises(NotImplementedError, match=f"backend '{theirs}' needs our '{ours}'"):
                Wrapper(torch.empty(1), backend=theirs)


def packed_for_small():
    """Two requests of one query block, one key block and two heads: a byte each."""
    return {
        "sparse_info": torch.full((2,), 3, dtype=torch.uint8),
        "sparse_kv_info": torch.full((2,), 3, dtype=torch.uint8),
        "sparse_info_indptr": int32(0, 1, 2),
        "sparse_kv_info_indptr": int32(0, 1, 2),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(99, 2, 32)}, r"q must be \[100, 2, 32\], got \[99, 2, 32\]"),
        ({"q": torch.zeros(100, 2, 32).half()}, "q must be float32, got float16"),
        ({"k": torch.zeros(100, 1, 32)}, r"k must be \[100, 2, 32\]"),
        ({"v": torch.zeros(100, 2, 16)}, r"v must be \[100, 2, 32\]"),
        ({"out": torch.zeros(100, 64)}, r"out must be \[100, 2, 32\]"),
        ({"out": torch.zeros(100, 2, 32, device="meta")}, "out must be on cpu, got meta"),
        ({"lse": torch.zeros(2, 100)}, r"lse must be \[100, 2\]"),
        ({"lse": torch.zeros(100, 2).half()}, "lse must be float32"),
        ({"sparse_info": None}, "sparse_info must be a tensor, got None"),
        ({"sparse_kv_info_indptr": None}, "sparse_kv_info_indptr must be a tensor"),
        ({"sparse_info": torch.ones(2)}, "sparse_info must be uint8, got float32"),
        ({"sparse_kv_info": torch.ones(1, dtype=torch.uint8)}, "sparse_kv_info must .* 2 bytes"),
        ({"sparse_info_indptr": int32(0, 1)}, r"sparse_info_indptr must be \[3\], got \[2\]"),
        ({"sparse_info_indptr": torch.zeros(3)}, "sparse_info_indptr must be int32 or int64"),
    ],
)
def test_runs_are_checked(change, message):
    """What was given and what is allowed."""
    wrapper = small()
    q, k, v = torch.randn(3, 100, 2, 32)
    arguments = {"q": q, "k": k, "v": v, **packed_for_small()}
    assert wrapper.run(**arguments).all()
    with pytest.raises(ValueError, match=message):
        wrapper.run(**{**arguments, **change})


def test_run_needs_a_plan_and_takes_nothing_more():
    """The authors' kernels had extra arguments; ours have none."""
    q = torch.zeros(100, 2, 32)
    with pytest.raises(RuntimeError, match="plan must be called before run"):
        Wrapper(torch.empty(1)).run(q, q, q, is_full=True)
    with pytest.raises(NotImplementedError, match="args must be empty after is_full, got 1"):
        small().run(q, q, q, None, None, None, None, True, "more")
    with pytest.raises(NotImplementedError, match="causal must be False"):
        small().forward(q, q, q, is_full=True, causal=True)
