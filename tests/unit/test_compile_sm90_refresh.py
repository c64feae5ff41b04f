"""The Hopper kernel of a refresh, compiled without a GPU: no serialised wgmma, no race, no spill
in a loop over visits."""

import re

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    pytest.skip("the kernel needs Triton 3.6", allow_module_level=True)

from compile_sm90 import SHARED_MEMORY, build, tensor_descriptor, writes_in_flight  # noqa: E402

from flashomni.kernels.attention._hopper.consumer import ROWS  # noqa: E402
from flashomni.kernels.attention.sm90 import TILE_M  # noqa: E402
from flashomni.kernels.refresh._hopper.messages import (  # noqa: E402
    IS_TILE,
    MAX_VISITS,
    OF_LIVE,
    OF_REST,
    OF_SUMMARIES,
)
from flashomni.kernels.refresh.sm90 import refresh_config, refresh_kernel  # noqa: E402

POINTERS = {
    "kv_bits": "*i32", "kv_len_ptr": "*i32", "redo": "*i32", "log_n": "*fp32", "scratch": "*fp32",
}  # fmt: skip
# Bytes by r that Triton stores and loads again where tiles and parts begin and end.
MAY_SPILL = {0: 0, 4: 128}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "per_block", "has_kv_len"), [("fp16", 0, True), ("bf16", 4, False)]
)
def test_refresh(dtype, per_block, has_kv_len):
    """Both passes of bf16 with summaries; fp16, which has one, without."""
    config = refresh_config(128, 128, per_block)
    kv_block = (1, 1, config.tile_n, config.head_dim)
    constants = {
        "PER_BLOCK": 128 // config.tile_n,
        "MAX_WORDS": 32,
        "COLUMNS": config.columns(128),
        "Q_STAGES": config.q_stages,
        "K_STAGES": config.k_stages,
        "V_STAGES": config.v_stages,
        "HAS_KV_LEN": has_kv_len,
        "ANCHORED": dtype == "bf16",
        "SUMMARIES": per_block,
        "CONSUMER_REGISTERS": config.registers[0],
        "PRODUCER_REGISTERS": config.registers[1],
    }
    if not constants["ANCHORED"]:
        constants["redo"] = None
    if not per_block:
        absent = ["mean_k_desc", "mean_v_desc", "log_n", "log_n_stride", "scratch"]
        constants |= dict.fromkeys(absent)
    if not has_kv_len:
        constants["kv_len_ptr"] = None
    blocks = {
        "q_desc": (1, 1, TILE_M, config.head_dim),
        **dict.fromkeys(["k_desc", "v_desc", "mean_k_desc", "mean_v_desc"], kv_block),
        **dict.fromkeys(["o_desc", "d_desc"], (1, 1, ROWS.value, config.head_dim)),
    }
    types = {name: tensor_descriptor(dtype, block) for name, block in blocks.items()}
    types |= {**POINTERS, "scale_log2": "fp32"}
    kernel = build(
        refresh_kernel, {name: kind for name, kind in types.items() if name not in constants},
        constants,
    )  # fmt: skip
    assert kernel.spilled_bytes <= MAY_SPILL[per_block]
    assert not kernel.warnings
    assert kernel.shared <= SHARED_MEMORY
    assert not writes_in_flight(kernel.sass())
    over_visits = [loop for loop in kernel.loops() if sum("DEPBAR" in line for line in loop) == 2]
    assert over_visits
    assert not any(
        re.match(r"(@!?U?P\w+ )?(LDL|STL)", line) for loop in over_visits for line in loop
    )


def test_words_of_a_message_hold_the_largest_call():
    """Two words have five numbers: none runs into the next, or into the sign."""
    largest, valid = MAX_VISITS - 1, 128
    visits = IS_TILE.value + OF_SUMMARIES.value * largest + largest
    assert visits < 1 << 31
    assert visits % OF_SUMMARIES.value == largest
    assert visits % IS_TILE.value // OF_SUMMARIES.value == largest
    keys = valid + OF_REST.value * valid + OF_LIVE.value * largest
    assert keys < 1 << 31
    assert keys % OF_REST.value == valid
    assert keys // OF_REST.value % (OF_LIVE.value // OF_REST.value) == valid
    assert keys // OF_LIVE.value == largest
