"""The portable kernels compile for sm_80, sm_86 and sm_90 without a GPU: no spills, they fit."""

import subprocess

import pytest

pytest.importorskip("triton", reason="needs Triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from flashomni.kernels.attention._forecast_tiles import TILE_M, forecast_kernel
from flashomni.kernels.attention._key_blocks import list_kernel
from flashomni.kernels.attention.portable import attention_kernel
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import DEFAULT, Config, tiles
from flashomni.kernels.elementwise import portable as elementwise
from flashomni.kernels.gemm_o.portable import gemm_o_kernel
from flashomni.kernels.gemm_q.portable import gemm_q_kernel
from flashomni.kernels.merge import portable as merge
from flashomni.kernels.summarise.portable import summarise_kernel
from flashomni.symbols.choice import _counts as counts
from flashomni.symbols.choice import _fine_kernels as fine
from flashomni.symbols.choice import _kernels as choice

pytestmark = pytest.mark.skipif(portable.INTERPRETED, reason="kernels are interpreted")
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes that a program may use
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TARGETS = [(80, "bf16", 128), (86, "bf16", 128), (90, "bf16", 128), (90, "fp16", 64)]
POINTERS = {"lse": "*fp32", "blocks": "*i16", "counts": "*i32", "kv_len": "*i32", "q_bits": "*u8",
            "kv_bits": "*u8", "cos": "*fp32", "sin": "*fp32", "coefficients": "*fp32"}  # fmt: skip
NUMBERS = {"scale": "fp32", "norm_eps": "fp32"}
TENSORS = ("q", "k", "v", "out", "x", "weight", "bias", "norm_weight", "o", "always", "terms",
           "partial")  # fmt: skip


def paths(kinds):
    """Where the values of nested tuples are, and what they are."""
    for index, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from (((index, *path), value) for path, value in paths(kind))
        else:
            yield (index,), kind


def _as_constants(kinds):
    """The same tuple; what is a number in it is named a constant."""
    if isinstance(kinds, tuple):
        return tuple(map(_as_constants, kinds))
    return kinds if isinstance(kinds, str) else "constexpr"


def compile_kernel(kernel, arch, dtype, constants, config=None, types=None, num_warps=4):
    """Pointers and strides aligned to 16 as they are in practice; a number in a tuple is fixed."""
    names = kernel.arg_names
    types = POINTERS | NUMBERS | {name: f"*{dtype}" for name in TENSORS} | (types or {})
    signature = {name: types.get(name, "i32") for name in names}
    signature |= {name: "constexpr" for name in constants}
    at = {name: (index,) for index, name in enumerate(names)}
    aligned = {
        at[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind[0] == "*" or (kind == "i32" and ("stride" in name or name == "count"))
    }
    aligned |= {
        (*at[name], *path): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if isinstance(kind, tuple)
        for path, value in paths(kind)
        if isinstance(value, str)
    }
    fixed = {at[name]: value for name, value in constants.items()}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            numbers = [(path, value) for path, value in paths(kind) if not isinstance(value, str)]
            fixed |= {(*at[name], *path): value for path, value in numbers}
            signature[name] = _as_constants(kind)
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": num_warps}
    if config is not None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, arch, tmp_path):
    """``(registers, bytes of stores to local memory, shared memory)``"""
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", str(ptx)]
    command += ["-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "serializ" not in log, log
    words = log.replace(",", "").split()
    spills = int(words[words.index("spill") - 2])
    registers = int(words[words.index("registers") - 1])
    return registers, spills, compiled.metadata.shared


def check(compiled, arch, tmp_path, may_spill=0, may_spill_later=64):
    registers, spills, shared = resources(compiled, arch, tmp_path)
    print(f"sm_{arch}: {registers} registers, {spills} bytes spilled, {shared} bytes shared")
    assert shared <= SHARED_MEMORY[arch]
    # Other releases than the one that the configurations were measured with may need a little more.
    assert spills <= (may_spill if triton.__version__.startswith("3.6") else may_spill_later)


def config_of(op, arch, dtype, head_dim):
    where = (f"sm_{arch}", DEFAULT)
    return tiles(f"{op}/portable", where, portable.padded(head_dim), SIZES[dtype])


def attention_constants(config, head_dim, dtype, block=128):
    return {
        "GROUPS": 1, "HEAD_DIM": head_dim, "PADDED_DIM": portable.padded(head_dim),
        "BLOCK_M": block, "BLOCK_N": block, "TILE_M": portable.dividing(config.tile_m, block),
        "TILE_N": portable.dividing(config.tile_n, block),
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", "lse": None, "kv_len": None,
        "redone": None, "ANCHORED": config.anchored and dtype != "fp16", "summary": None,
        "SUMMARIES": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
@pytest.mark.parametrize("anchored", [False, True])
def test_attention(arch, dtype, head_dim, anchored, tmp_path):
    """With lists, the form of every sparse step; either softmax, where it may be chosen."""
    if anchored and (arch == 80 or dtype == "fp16"):
        pytest.skip("online there: sm_80 would spill, fp16 has not the exponents")
    config = config_of("attention", arch, dtype, head_dim)._replace(anchored=anchored)
    constants = attention_constants(config, head_dim, dtype)
    compiled = compile_kernel(attention_kernel, arch, dtype, constants, config)
    check(compiled, arch, tmp_path)
    if arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
def test_attention_with_summaries(arch, dtype, head_dim, tmp_path):
    """Visits of summaries come behind the others, in a loop of their own."""
    config = config_of("attention", arch, dtype, head_dim)
    constants = attention_constants(config, head_dim, dtype) | {"SUMMARIES": 4, "ANCHORED": False}
    del constants["summary"]
    strides = ("i32",) * 3
    summary = (f"*{dtype}", f"*{dtype}", "*fp32", "*u8", strides, strides, ("i32",) * 4)
    types = {"summary": summary}
    compiled = compile_kernel(attention_kernel, arch, dtype, constants, config, types)
    check(compiled, arch, tmp_path, may_spill=32)  # 255 registers before


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(1, 1, 1, 1), ("i32", "i32", 1, 1)], ids=["one", "column"])
def test_attention_with_a_single_summary(bits):
    """Triton takes strides that are 1 as constants: of one block of queries, and of keys."""
    config = config_of("attention", 90, "bf16", 64)
    constants = attention_constants(config, 64, "bf16") | {"SUMMARIES": 1, "ANCHORED": False}
    del constants["summary"]
    summary = ("*bf16", "*bf16", "*fp32", "*u8", ("i32",) * 3, ("i32",) * 3, bits)
    compile_kernel(attention_kernel, 90, "bf16", constants, config, {"summary": summary})


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
@pytest.mark.parametrize("per_block", [0, 4])
def test_difference(arch, dtype, head_dim, per_block, tmp_path):
    """Two parts alone, and with summaries of the blocks of one."""
    constants = {
        "GROUPS": 1, "HEAD_DIM": head_dim, "PADDED_DIM": portable.padded(head_dim), "BLOCK_M": 128,
        "BLOCK_N": 128, "SUMMARIES": per_block, "TILE_N": merge.TILE_N, "PRECISION": "tf32",
        "TILE_M": merge.TILE_M if per_block else merge.PLAIN_ROWS, "kv_len": None,
    }  # fmt: skip
    if not per_block:
        constants |= dict.fromkeys(("q", "k", "v", "log_n", "bits"))
    strides = dict.fromkeys(("live", "rest", "live_lse", "rest_lse", "q", "k", "v"), ("i32",) * 3)
    types = {f"{name}_strides": kind for name, kind in strides.items()}
    types |= {"bit_strides": ("i32",) * 4, "live": f"*{dtype}", "rest": f"*{dtype}"}
    types |= {"live_lse": "*fp32", "rest_lse": "*fp32", "log_n": "*fp32", "bits": "*u8"}
    compiled = compile_kernel(merge.difference_kernel, arch, dtype, constants, types=types)
    check(compiled, arch, tmp_path, may_spill_later=72)  # with 3.9: four summaries, bf16, 128
    if arch == 90 and per_block:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("width", [8, 32, 48, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_summarise(arch, width, tmp_path):
    """Means over so many tokens."""
    constants = {
        "HEAD_DIM": 128, "PADDED_DIM": 128, "WIDTH": width, "STEP": 8, "ROWS": 8,
        "kv_len": None,
    }  # fmt: skip
    types = {"k_out": "*bf16", "v_out": "*bf16", "log_n": "*fp32"}
    compiled = compile_kernel(summarise_kernel, arch, "bf16", constants, types=types)
    check(compiled, arch, tmp_path)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
@pytest.mark.parametrize("count", [1, 3])
def test_forecast(arch, dtype, head_dim, count, tmp_path):
    """Terms of contiguous heads, which are loaded in vectors."""
    types = dict.fromkeys(forecast_kernel.arg_names, "i32")
    types |= {"out": f"*{dtype}", "coefficients": "*fp32", "q_bits": "*u8"}
    types |= {
        "terms": (f"*{dtype}",) * count,
        "strides": (("i32", "i32", "i32", "constexpr"),) * count,
    }
    constants = {"HEAD_DIM": head_dim, "PADDED_DIM": head_dim, "BLOCK_M": 128, "TILE_M": TILE_M,
                 "coefficient_stride": 1}  # fmt: skip
    at = {name: index for index, name in enumerate(types)}
    fixed = {(at[name],): value for name, value in constants.items()}
    fixed |= {(at["strides"], t, 3): 1 for t in range(count)}
    aligned = [(at[name],) for name in types if name.startswith("out")]
    aligned += [(at["terms"], t) for t in range(count)]
    aligned += [(at["strides"], t, dim) for t in range(count) for dim in range(3)]
    source = ASTSource(
        forecast_kernel,
        types | dict.fromkeys(constants, "constexpr"),
        fixed,
        {path: [["tt.divisibility", 16]] for path in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    check(compiled, arch, tmp_path)
    assert compiled.asm["ptx"].count("ld.global.v4.b32") >= count


ELEMENTWISE = {
    "_modulate_kernel": {"FEATURES": 3072, "PADDED": 4096, "RMS": False, "NORMS_Y": False,
                         "weight": None},
    "_modulate_kernel rms": {"FEATURES": 3072, "PADDED": 4096, "RMS": True, "NORMS_Y": False},
    "_modulate_kernel normed": {"FEATURES": 3072, "PADDED": 4096, "RMS": False, "NORMS_Y": True,
                                "out": None, "scale": None, "shift": None},
    "_norm_rope_kernel": {"HEADS": 24, "HEAD_DIM": 128, "PADDED_DIM": 128, "HAS_NORM": True,
                          "OWN_TABLES": False, "HALF": False, "PAIRS": elementwise.PAIRS},
    "_norm_rope_kernel own half": {"HEADS": 24, "HEAD_DIM": 128, "PADDED_DIM": 128,
                                   "HAS_NORM": True, "OWN_TABLES": True, "HALF": True,
                                   "PAIRS": elementwise.PAIRS},
    "_differences_kernel": {"VALUE_WIDTH": 3072, "MINUS_WIDTH": 0, "IS_LONG": True,
                            "BLOCK": elementwise.BLOCK},
    "_weighted_sum_kernel": {"WIDTH": 3072, "IS_LONG": False, "BLOCK": elementwise.BLOCK},
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_elementwise(name, arch, tmp_path):
    """With everything that is optional; they are bound by memory, so loads are wide."""
    kernel = getattr(elementwise, name.partition(" ")[0])
    pointers = ("y", "gate", "scale", "shift", "sum_out", "value", "minus", "base",
                *(f"{kind}_{i}" for kind in ("old", "new", "term") for i in range(4)))  # fmt: skip
    types = dict.fromkeys(pointers, "*bf16") | {
        "eps": "fp32",
        **dict.fromkeys(("per_0", "per_1", "per_2"), "fp32"),
    }
    compiled = compile_kernel(kernel, arch, "bf16", ELEMENTWISE[name], types=types, num_warps=8)
    check(compiled, arch, tmp_path)
    assert "ld.global.v4.b32" in compiled.asm["ptx"]


def test_lists(tmp_path):
    """1024 key blocks: 131,072 tokens."""
    constants = {"BLOCK_N": 128, "COLUMNS": 1024, "kv_len": None}
    check(compile_kernel(list_kernel, 80, "bf16", constants), 80, tmp_path)


@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
def test_gemm_q(arch, dtype, head_dim, tmp_path):
    """With bias, norm and RoPE."""
    config = config_of("gemm_q", arch, dtype, head_dim)
    constants = {
        "HEAD_DIM": head_dim, "PADDED_DIM": portable.padded(head_dim), "BLOCK_M": 128,
        "TILE_M": config.tile_m, "TILE_K": config.tile_k, "IS_RAGGED": False, "IS_NORMED": True,
        "PAIRS_APART": False, "PRECISION": "tf32",
    }  # fmt: skip
    check(compile_kernel(gemm_q_kernel, arch, dtype, constants, config), arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "head_dim"), TARGETS)
@pytest.mark.parametrize("mode", ["dispatch", "update"])
def test_gemm_o(arch, dtype, head_dim, mode, tmp_path):
    """A Dispatch step with bias terms; the Update pass with always-on columns."""
    config = config_of("gemm_o", arch, dtype, head_dim)
    constants = {
        "HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_M": 128, "TILE_M": config.tile_m,
        "TILE_N": config.tile_n, "TILE_K": config.tile_k, "CACHED": mode == "update",
        "IS_RAGGED": False, "PRECISION": "tf32",
    }  # fmt: skip
    absent = ("terms", "coefficients") if mode == "update" else ("partial", "always")
    constants |= dict.fromkeys(absent)
    check(compile_kernel(gemm_o_kernel, arch, dtype, constants, config), arch, tmp_path)


CHOICE_POINTERS = dict.fromkeys(
    ("q_means", "k_means", "q_similarity", "k_similarity", "progress", "given", "guide",
     "densities"), "*fp32",
) | {
    "text_q": "*u8", "text_kv": "*u8", "bits": "*u8", "index": "*i32", "words": "*i32",
    "filled": "*i32", **dict.fromkeys(("tau", "power", "gate", "ratio", "min_skip"), "fp32"),
}  # fmt: skip
CHOICE = {
    "pool_kernel": {"BLOCK_M": 128, "BLOCK_N": 128, "TILE_M": 128, "TILE_N": 128, "HEAD_DIM": 128,
                    "PADDED_DIM": 128, "PADDED_Q": True, "GATED": True},
    "visit_kernel": {"BLOCK_M": 128, "BLOCK_N": 128, "HEAD_DIM": 128, "DIMS": 16, "ROWS": 8,
                     "COLUMNS": 1024, "VISIT": "mass", "GIVEN": "text", "GROWS": True,
                     "TEXT_ROWS": True, "TEXT_COLUMNS": True, "CENTER": False, "DIAGONAL": True,
                     "masses": None},
    "means_kernel": {"BLOCK_M": 128, "BLOCK_N": 128, "PARTS": 2, "SIZE": 8,
                     "HEAD_DIM": 128, "PADDED_DIM": 128, "PADDED_Q": True, "GATED": True},
    "map_kernel": {"Q_PARTS": 16, "Q_PADDED": 16, "K_PARTS": 16, "K_PADDED": 16, "SIZE": 8,
                   "HEAD_DIM": 128, "PADDED_DIM": 128, "ROWS": 64, "COLUMNS": 128,
                   "PADDED_Q": True, "WIDTH": 64},
    "cache_kernel": {"ROWS": 1024, "PARTS": 8, "COMPUTE": "and", "MAP": "area", "WINDOW": 3,
                     "GROWS": True, "SHARED": False},
    "measure_kernel": {"HEADS": 1, "ROWS": 256, "WORDS": 32},
}  # fmt: skip
CHOICE_WARPS = {"visit_kernel": 8, "cache_kernel": 8, "measure_kernel": 32, "means_kernel": 1,
                "map_kernel": 8}  # fmt: skip
FINE = {"q_means": "*fp16", "k_means": "*fp16", "masses": "*fp32", "scale": "fp32",
        "sums": "*fp32", "maxima": "*fp32"}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", sorted(CHOICE))
def test_choice(name, arch, tmp_path):
    """131,072 tokens, with everything that a policy may ask for."""
    config = Config(0, 0, 0, num_warps=CHOICE_WARPS.get(name, 4), num_stages=1)
    kernel = next(getattr(m, name) for m in (choice, fine, counts) if hasattr(m, name))
    types = CHOICE_POINTERS | (FINE if hasattr(fine, name) else {})
    compiled = compile_kernel(kernel, arch, "bf16", CHOICE[name], config, types=types)
    check(compiled, arch, tmp_path)
