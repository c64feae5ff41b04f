"""Which part of a step a kernel belongs to, by its name; and what nobody knows."""

import ast
from pathlib import Path

import pytest

import flashomni
from flashomni.lab.e2e import breakdown, parts

SOURCE = Path(flashomni.__file__).parent


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (parts.ATTENTION, [
            "attention_kernel",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_kernel",
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, cutlass>>",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)",
            "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object",
            "triton_tem_fused_flex_attention_0",
        ]),
        (parts.GEMM_Q, ["gemm_q_kernel"]),
        (parts.GEMM_O, ["gemm_o_kernel"]),
        (parts.GEMM, [
            "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNN",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16>",
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
            "triton_tem_fused_mm_3", "aten::addmm", "aten::bmm",
        ]),
        (parts.POINTWISE, [
            "triton_poi_fused_add_mul_split_0",
            "triton_poi_fused__scaled_dot_product_cudnn_attention_cat_7",
            "triton_red_fused__to_copy_native_layer_norm_2",
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<BFloat16>",
            "void at::native::reduce_kernel<512, 1, at::native::MeanOps<float>>", "aten::mul",
        ]),
        (parts.SYMBOLS, ["pool_kernel", "_list_heads", "_order_kernel"]),
        (parts.COPIES, [
            "Memcpy DtoD (Device -> Device)", "Memset (Device)",
            "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>",
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<OpaqueType<2u>>",
            "aten::copy_",
        ]),
        (parts.OTHER, ["something_nobody_knows"]),
    ],
)  # fmt: skip
def test_kernels_are_classified(part, names):
    """By name, as profilers show them."""
    assert {name: parts.part_of(name) for name in names} == dict.fromkeys(names, part)


def launched(path):
    """Names of the kernels that a file launches: ``name[grid](...)``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield getattr(node.func.value, "id", "")


def test_every_kernel_of_ours_is_classified():
    """A new kernel is known by the folder it is in; none shows up as ``other``."""
    found = {
        name
        for folder in ("kernels", "symbols", "policies", "engine", "models")
        for path in (SOURCE / folder).rglob("*.py")
        for name in launched(path)
        if name.endswith("_kernel") or name.startswith("_list")
    }
    assert len(found) >= 9
    assert [name for name in sorted(found) if parts.part_of(name) == parts.OTHER] == []


def test_what_nobody_knows_stays_visible():
    """Sums are by part; unknown kernels keep their names, the longest first."""
    kernels = [("nvjet_a", 1.0), ("nvjet_b", 2.0), ("what", 0.5), ("why", 0.7), ("what", 0.5)]
    step = breakdown.classify(kernels, idle_ms=0.25)
    assert step.ms == {parts.GEMM: 3.0, parts.OTHER: 1.7, parts.IDLE: 0.25}
    assert step.unknown == [("what", 1.0), ("why", 0.7)]


def test_idle_is_what_no_kernel_covers():
    """Overlapping kernels count once."""
    assert breakdown.idle([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 2
    assert breakdown.idle([]) == 0
