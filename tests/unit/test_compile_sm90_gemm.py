"""The Hopper GEMMs compile for sm_90 without a GPU: no spills, no serialised products, they fit."""

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 with Gluon")

from compile_sm90 import SHARED_MEMORY, build, tensor_descriptor, writes_in_flight

from flashomni.kernels.common.hopper_gemm import stages
from flashomni.kernels.gemm_o.sm90 import gemm_o_kernel, group_width
from flashomni.kernels.gemm_q.sm90 import gemm_q_kernel

KINDS = [("bf16", 128), ("fp16", 64)]  # dtype and head_dim


def check(kernel):
    assert kernel.spilled_bytes == 0 and "0 bytes stack frame" in kernel.ptxas_log
    assert not kernel.warnings
    assert kernel.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in kernel.ptx
    assert not writes_in_flight(kernel.sass())  # products go on while terms and tables are fetched


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize(
    "absent", ["", "bias packing", "norm_weight", "rope", "cut halves", "bias norm rope cut"]
)
def test_gemm_q(dtype, head_dim, absent):
    """Bias, norm, its weight, RoPE and a start inside a tile present and absent."""
    types = {
        "x_desc": tensor_descriptor(dtype, (1, 1, 128, 64)),
        "w_desc": tensor_descriptor(dtype, (head_dim, 64)),
        "out_desc": tensor_descriptor(dtype, (1, 1, 64, head_dim)),
        "cut_desc": tensor_descriptor(dtype, (1, 1, 64, head_dim)),
        "rope_desc": tensor_descriptor("fp32", (64, head_dim)),
        "bias_ptr": f"*{dtype}",
        "norm_ptr": f"*{dtype}",
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "work_ptr": "*i32",
        "norm_eps": "fp32",
    }
    missing = set(absent.split())
    constants = {"D": head_dim, "NORM": "norm" not in missing, "STAGES": stages(head_dim)}
    if "bias" in missing:
        constants["bias_ptr"] = None
    if "cut" in missing:
        constants["cut_desc"] = None
    if missing & {"norm", "norm_weight"}:
        constants["norm_ptr"] = None
    if "rope" in missing:
        constants |= {"cos_ptr": None, "sin_ptr": None}
    constants["ROPE"] = None if "rope" in missing else ("halves" in missing, head_dim, 2)
    if missing & {"rope", "packing"}:
        constants["rope_desc"] = None
    check(build(gemm_q_kernel, types, constants))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize(
    "mode", ["dense", "terms", "always", "terms always cut", "update", "update cut", "no bias"]
)
def test_gemm_o(dtype, head_dim, mode):
    """Bias terms, always-on columns and bias present and absent; the Update pass."""
    types = {
        "o_desc": tensor_descriptor(dtype, (1, 1, 128, 64)),
        "always_desc": tensor_descriptor(dtype, (1, 1, 128, 64)),
        "w_desc": tensor_descriptor(dtype, (128, 64)),
        "out_desc": tensor_descriptor(dtype, (1, 1, 64, 128)),
        "terms_desc": tensor_descriptor("bf16", (1, 1, 64, 128)),
        "cut_desc": tensor_descriptor(dtype, (1, 1, 64, 128)),
        "cut_terms_desc": tensor_descriptor("bf16", (1, 1, 64, 128)),
        "bias_ptr": f"*{dtype}",
        "coefficients_ptr": "*fp32",
        "rows_ptr": "*i32",
        "words_ptr": "*i64",
    }
    is_update = "update" in mode
    constants = {"D": head_dim, "UPDATE": is_update, "STAGES": stages(128)}
    if "terms" not in mode:
        constants["coefficients_ptr"] = None
    if "terms" not in mode and not is_update:
        constants["terms_desc"] = None
    if "cut" not in mode:
        constants["cut_desc"] = None
    if "cut" not in mode or not is_update:
        constants["cut_terms_desc"] = None
    if "always" not in mode:
        constants["always_desc"] = None
    if mode == "no bias":
        constants["bias_ptr"] = None
    check(build(gemm_o_kernel, types, constants))


def test_groups_of_features():
    """As many features as rows in a round; no group where there are few rounds or features."""
    ctas = 132
    assert group_width(24, 258, ctas) == 12
    assert group_width(40, 591, ctas) == 14
    assert group_width(24, 36, ctas) == 24  # seven rounds
    assert group_width(12, 258, ctas) == 12
    assert group_width(1, 4000, ctas) == 1
