"""The Hopper attention kernel, compiled without a GPU: no spill, no serialised wgmma, no race."""

import functools
import re

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip("the kernel needs Triton 3.6", allow_module_level=True)

from compile_sm90 import SHARED_MEMORY, TOOLS, build, tensor_descriptor, writes_in_flight  # noqa: E402

from flashomni.kernels.attention._hopper.consumer import ROWS  # noqa: E402
from flashomni.kernels.attention.sm90 import (  # noqa: E402
    LISTED,
    TILE_M,
    attention_kernel,
    choose_config,
)
from flashomni.kernels.common.hopper import MOVES_OPERANDS  # noqa: E402

POINTERS = {"lse_ptr": "*fp32", "q_bits": "*u8", "kv_bits": "*i32", "kv_len_ptr": "*i32",
            "order": "*i32", "redo": "*i32", "redone": "*i32", "log_n": "*fp32"}  # fmt: skip
FULL = {"IS_SPARSE": True, "IS_RAGGED": True, "HAS_KV_LEN": True, "HAS_LSE": True}
# (dtype, head_dim, block_n, what the call has)
CASES = {
    "dense": ("bf16", 128, 128, {}),
    "dense ragged": ("bf16", 128, 128, {"IS_RAGGED": True}),
    "sparse": ("bf16", 128, 128, {"IS_SPARSE": True}),
    "sparse ragged": ("bf16", 128, 128, {"IS_SPARSE": True, "IS_RAGGED": True}),
    "sparse with everything": ("bf16", 128, 128, FULL),
    "more than 131k keys": ("bf16", 128, 128, {**FULL, "MAX_WORDS": 64}),
    "fp16": ("fp16", 128, 128, {"IS_SPARSE": True}),
    "head_dim 64": ("bf16", 64, 128, FULL),
    "head_dim 96": ("bf16", 96, 128, FULL),
    "head_dim 80": ("bf16", 80, 128, FULL),
    "head_dim 256": ("bf16", 256, 128, FULL),
    "block_n 64": ("bf16", 128, 64, FULL),
    "summaries": ("bf16", 128, 128, {**FULL, "SUMMARIES": 4}),
    "summaries, head_dim 256": ("bf16", 256, 128, {**FULL, "SUMMARIES": 4}),
}


def compiled(dtype, head_dim, block_n, flags):
    config = choose_config(head_dim, block_n)
    block = (1, 1, TILE_M, config.head_dim)
    kv_block = (1, 1, config.tile_n, config.head_dim)
    o_block = (1, 1, ROWS.value, min(config.head_dim, 128))
    constants = {
        "PER_BLOCK": block_n // config.tile_n,
        "MAX_WORDS": 32,
        "LISTED": LISTED,
        "COLUMNS": config.columns(head_dim),
        "Q_STAGES": config.q_stages,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "CONSUMER_REGISTERS": config.registers[0],
        "PRODUCER_REGISTERS": config.registers[1],
        "ANCHORED": dtype == "bf16",
        "SUMMARIES": 0,
        **dict.fromkeys(FULL, False),
        **flags,
    }
    absent = {
        "lse_ptr": "HAS_LSE", "kv_len_ptr": "HAS_KV_LEN",
        "q_bits": "IS_SPARSE", "kv_bits": "IS_SPARSE", "order": "IS_SPARSE",
    }  # fmt: skip
    constants |= {name: None for name, flag in absent.items() if not constants[flag]}
    if not constants["ANCHORED"]:
        constants |= {"redo": None, "redone": None}
    if not constants["SUMMARIES"]:
        constants |= dict.fromkeys(["mean_k_desc", "mean_v_desc", "log_n", "log_n_stride"])
    types = {
        "mean_k_desc": tensor_descriptor(dtype, kv_block),
        "mean_v_desc": tensor_descriptor(dtype, kv_block),
        "q_desc": tensor_descriptor(dtype, block),
        "k_desc": tensor_descriptor(dtype, kv_block),
        "v_desc": tensor_descriptor(dtype, kv_block),
        "o_desc": tensor_descriptor(dtype, o_block),
        "scale_log2": "fp32",
        **{name: kind for name, kind in POINTERS.items() if name not in constants},
    }
    return build(attention_kernel, types, constants)


# Bytes that Triton 3.6 stores and loads again, outside of the loops over visits: what the producer
# of summaries has no registers for, and what 256 columns of output leave no room for.
MAY_SPILL = {
    "more than 131k keys": 8, "summaries": 32, "head_dim 256": 188, "summaries, head_dim 256": 236,
}  # fmt: skip
# Triton 3.9
MAY_SPILL_LATER = {"head_dim 256": 116, "summaries": 64, "summaries, head_dim 256": 188}


def spills(sass):
    return [line for line in sass if re.match(r"(@!?U?P\w+ )?(LDL|STL)", line)]


def loops_over_visits(kernel):
    """Each multiplies twice, and waits for both."""
    return [
        loop
        for loop in kernel.loops()
        if any("HGMMA" in line for line in loop) and sum("DEPBAR" in line for line in loop) == 2
    ]


@functools.cache
def compiled_case(name):
    return compiled(*CASES[name])


KERNELS = [
    pytest.param(name, id=name.replace(" ", "-"), marks=() if name == "dense" else pytest.mark.slow)
    for name in CASES
]


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request):
    return compiled_case(request.param)


@pytest.fixture
def may_spill(request):
    name = request.node.callspec.params["kernel"]
    return (MAY_SPILL_LATER if MOVES_OPERANDS.value else MAY_SPILL).get(name, 0)


@pytest.mark.slow
def test_fits_and_does_not_spill(kernel, may_spill):
    """Registers and shared memory suffice; ptxas neither spills nor serialises wgmma."""
    assert kernel.spilled_bytes <= may_spill
    assert not kernel.warnings
    assert kernel.shared <= SHARED_MEMORY


@pytest.mark.slow
def test_what_runs_does_not_spill(kernel, may_spill):
    """Triton calls ptxas with options of its own: the machine code itself is free of spills.

    That of Triton 3.9 has some where tiles begin and end; nothing has any in a loop over visits.
    """
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton ships no cuobjdump")
    if may_spill == 0 and not MOVES_OPERANDS.value:
        assert not spills(kernel.sass())
    assert loops_over_visits(kernel)
    for loop in loops_over_visits(kernel):
        assert not spills(loop)


def test_no_register_of_a_running_wgmma_is_written(kernel):
    """A linear scan of the machine code: wgmma use registers until they are waited for."""
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton ships no cuobjdump")
    sass = kernel.sass()
    assert any(line.startswith("HGMMA") for line in sass)
    assert not writes_in_flight(sass)


def test_the_scan_sees_a_write():
    """Accumulators, and operands held in registers, before the wait; not after it."""
    wgmma = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR16], R24, gsb0"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    for write in (
        "MOV R152, R1",
        "FADD R30, R1, R2",
        "LDSM.16.M88.4 R150, [R1]",
        "@P0 MUFU.EX2 R87, R3",
    ):
        assert writes_in_flight([wgmma, write, wait]) == [write]
        assert not writes_in_flight([wgmma, wait, write])
    assert not writes_in_flight([wgmma, "FADD R156, R24, R25", "STS [R24], R153", wait])


@pytest.mark.slow
def test_the_loop_over_visits_does_nothing_but_multiply_and_weigh():
    """No repacking (PRMT), no maxima, and few enough instructions for two warpgroups to overlap."""
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton ships no cuobjdump")
    visits = loops_over_visits(compiled_case("sparse ragged"))
    assert len(visits) == 4  # two warpgroups, anchored and online
    for loop in visits:
        assert not any("PRMT" in line for line in loop)
    anchored = [loop for loop in visits if sum("FMNMX" in line for line in loop) <= 1]
    assert len(anchored) == 2
    for loop in anchored:
        assert sum("MUFU.EX2" in line for line in loop) == 64
        # The rare sums of rounded weights are 128 of them; Triton 3.9 makes it 45 more.
        assert len(loop) <= (490 if MOVES_OPERANDS.value else 460)


@pytest.mark.slow
def test_summaries_have_loops_of_their_own():
    """What blocks cost is what they cost without; a visit of summaries adds what they weigh."""
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton ships no cuobjdump")
    without = loops_over_visits(compiled_case("sparse with everything"))
    visits = loops_over_visits(compiled_case("summaries"))
    assert len(visits) == 2 * len(without) == 8
    shortest = sorted(map(len, visits))[:4]
    assert shortest == pytest.approx(sorted(map(len, without)), abs=16)
    for loop in visits:
        assert not any("PRMT" in line for line in loop) and len(loop) <= 600
