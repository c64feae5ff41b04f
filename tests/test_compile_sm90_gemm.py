"""The Hopper GEMMs compile for sm_90 without a GPU: no spills, no serialised products, they fit."""

import subprocess

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 with Gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from flashomni.kernels._gemm_sm90 import stages
from flashomni.kernels.gemm_o_sm90 import gemm_o_kernel
from flashomni.kernels.gemm_q_sm90 import gemm_q_kernel

SHARED_MEMORY = 227 * 1024  # of a CTA
KINDS = [("bf16", 128), ("fp16", 64)]  # dtype and head_dim


def block(dtype, *shape):
    """Type of a TMA descriptor."""
    layout = gl.NVMMASharedLayout(128, 32 if dtype == "fp32" else 16, len(shape))
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout}>"


def compile_kernel(kernel, types, constants):
    """What runs on the device, and what the assembler says about it."""
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    signature |= {name: "constexpr" for name in constants}
    at = {name: (index,) for index, name in enumerate(names)}
    aligned = {
        at[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*")
    }
    source = GluonASTSource(
        kernel, signature, {at[name]: value for name, value in constants.items()}, aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def check(compiled, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    assembler = get_ptxas(90).path
    command = [assembler, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "frame, 0 bytes spill stores, 0 bytes spill loads" in log, log
    assert "serializ" not in log and "Performance Loss" not in log, log
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize(
    "absent", ["", "bias packing", "norm_weight", "rope", "cut halves", "bias norm rope cut"]
)
def test_gemm_q(dtype, head_dim, absent, tmp_path):
    """Bias, norm, its weight, RoPE and a start inside a tile present and absent."""
    types = {
        "x_desc": block(dtype, 1, 1, 128, 64),
        "w_desc": block(dtype, head_dim, 64),
        "out_desc": block(dtype, 1, 1, 64, head_dim),
        "cut_desc": block(dtype, 1, 1, 64, head_dim),
        "rope_desc": block("fp32", 64, head_dim),
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
    check(compile_kernel(gemm_q_kernel, types, constants), tmp_path)


@pytest.mark.parametrize(("dtype", "head_dim"), KINDS)
@pytest.mark.parametrize(
    "mode", ["dense", "terms", "always", "terms always cut", "update", "update cut", "no bias"]
)
def test_gemm_o(dtype, head_dim, mode, tmp_path):
    """Bias terms, always-on columns and bias present and absent; the Update pass."""
    types = {
        "o_desc": block(dtype, 1, 1, 128, 64),
        "always_desc": block(dtype, 1, 1, 128, 64),
        "w_desc": block(dtype, 128, 64),
        "out_desc": block(dtype, 1, 1, 64, 128),
        "terms_desc": block("bf16", 1, 1, 64, 128),
        "cut_desc": block(dtype, 1, 1, 64, 128),
        "cut_terms_desc": block("bf16", 1, 1, 64, 128),
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
    check(compile_kernel(gemm_o_kernel, types, constants), tmp_path)
