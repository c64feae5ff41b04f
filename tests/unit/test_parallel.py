"""Two ranks that share a sequence compute what one computes: `two_ranks.py` runs, this reads."""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from two_ranks import CALLED, CASES, LAYERS, STEPS
from two_ranks_rows import CASES as ROWS

from flashomni.parallel import Layout

SCRIPT = Path(__file__).with_name("two_ranks.py")
on_ranks = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found: one pair, however many processes run tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    outs = [folder / f"rank{rank}.json" for rank in range(2)]
    with (folder / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(out.exists() for out in outs):
            run_both(folder, outs)
    return [json.loads(out.read_text()) for out in outs]


def run_both(folder, outs):
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    processes = []
    for rank, (out, log) in enumerate(zip(outs, logs, strict=True)):
        command = [sys.executable, SCRIPT, str(rank), folder / "store", out]
        with log.open("w") as file:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    try:
        codes = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)


@on_ranks
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(ranks, case):
    """Outputs of all steps, kinds of all layers; both ranks have the same bits."""
    for found in ranks:
        assert found[case]["difference"] <= 2e-6
        assert found[case]["alike"]
        assert found[case]["kinds"]


@on_ranks
@pytest.mark.parametrize("case", CASES)
def test_symbols_are_those_of_one_rank(ranks, case):
    """Bit for bit, of the heads that each rank has."""
    for found in ranks:
        assert found[case]["symbols"]
        kept_whole = case.endswith(
            ("fora", "taylorseer", "easycache", "balanced")
        )  # it has no symbols
        assert found[case]["compared"] or kept_whole


@on_ranks
@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_is_cached_whole_communicates_nothing(ranks, case):
    """Four all-to-alls a layer that runs, one more in a refresh; an all-gather an Update."""
    for found in ranks:
        one = found[case]
        refreshes = 2 * (case in ("hold", "extrapolate"))
        assert one["exchanges"] == 4 * one["computed"] + refreshes * LAYERS
        began = 1  # whether the ranks began alike
        if case in ("lossless", "svg", "fora", "taylorseer"):  # nothing is chosen tile by tile
            assert one["gathers"] == began
        elif case.endswith("topk"):  # no S_q
            assert one["gathers"] == began + one["updates"]
        assert one["gathers"] <= began + one["updates"] + LAYERS + (refreshes > 0)  # room for D
    if case in ("fora", "taylorseer", "easycache", "cached by measure"):
        assert one["computed"] < STEPS * LAYERS


@on_ranks
def test_a_layer_is_cached_whole_by_what_all_heads_say(ranks):
    """Some are, some are not, and both ranks take the same: else they would wait for ever."""
    kinds = ranks[0]["cached by measure"]["rows"]
    assert ranks[1]["cached by measure"]["rows"] == kinds
    assert any("bypass" in row and "dispatch" in row for row in kinds)


@on_ranks
@pytest.mark.parametrize("case", CALLED)
def test_the_forecast_is_in_front_of_a_projection_that_is_called(ranks, case):
    """It is by rows, of all heads, and so added behind the way back."""
    for found in ranks:
        assert found[case]["called"] and not found[case.removeprefix("called ")]["called"]


@on_ranks
@pytest.mark.parametrize("case", ROWS)
def test_rows_and_heads_go_there_and_back(ranks, case):
    """However streams and heads divide, wherever they lie, and whatever is waited for first."""
    for found in ranks:
        assert found["rows"][case]


@on_ranks
def test_bytes_follow_from_the_shapes(ranks):
    """q, k, v and o in fp32, of each the half that is for the other rank."""
    rows, width, batch = (78 + 18 * 19) // 2, 4 * 16, 2
    once = 4 * 4 * batch * rows * width // 2
    for number, found in enumerate(ranks):
        assert found["lossless"]["bytes"] == once * STEPS * LAYERS
        (note,) = found["lossless"]["note"]
        assert f"rank {number} of 2" in note


@on_ranks
def test_parallelism_may_come_after_accelerate_and_stay_after_remove(ranks):
    """The next generation is spread; without the engine it is diffusers' own, bit for bit."""
    for found in ranks:
        orders = found["orders"]
        assert orders["alone"] and orders["stock"]
        assert orders["difference"] <= 2e-6
        assert orders["exchanges"] == 4 * STEPS * LAYERS


REFUSED = {
    "ring": "NotImplementedError: .*ring attention",
    "heads": "NotImplementedError: .*1 heads .*2 ranks",
    "share_heads": "NotImplementedError: .*share_heads",
    "first_block": "NotImplementedError: .*schedule 'first_block'",
    "order": "NotImplementedError: .*token_order 'tile'",
    "tensor": "NotImplementedError: .*tensor parallelism",
    "unified": "NotImplementedError: .*unified",
    "animate": "NotImplementedError: .*not for WanAnimateTransformer3DModel",
    "root": "NotImplementedError: .*LTXVideoTransformer3DModel.*hidden_states.*ulysses=n",
    "twice": "NotImplementedError: .*enable_parallelism both",
    "added": "NotImplementedError: controlnet_block_samples of FluxTransformer2DModel",
    "noise inside": r"ValueError: hidden_states .*generator=torch.Generator\('cpu'\)",
    "few": "ValueError: encoder_hidden_states has 1 tokens",
    "not all": "ValueError: ulysses times cfg .*ulysses=3 and cfg=1 on 2",
    "no number": "ValueError: ulysses must be a number of ranks",
    "generic": "NotImplementedError: .*context parallelism",
    "noise": r"ValueError: hidden_states .*generator=torch.Generator\('cpu'\)",
    "noise of one step": r"ValueError: hidden_states .*generator=torch.Generator\('cpu'\)",
    "within": "NotImplementedError: .*within a generation",
    "odd": "ValueError: encoder_hidden_states has 77 tokens.*ulysses_anything",
    "ids": "ValueError: RoPE covers 420 tokens, and the block has 210.*img_ids",
    "saved": "NotImplementedError: .*own heads",
}


@on_ranks
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_by_name_on_both_ranks(ranks, what):
    for found in ranks:
        message = found["refusals"][what]
        assert message.startswith(REFUSED[what].partition(":")[0])
        assert re.search(REFUSED[what], message), message


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_of_all_ranks_are_the_sequence(size):
    """Each row is on one rank, at one place; text in front on each of them."""
    layout = Layout.split((77, 345), size)
    places = [
        place
        for rank in range(size)
        for rows, start in layout.places(rank, 0, layout.rows(rank))
        for place in range(start, start + rows.stop - rows.start)
    ]
    assert sorted(places) == list(range(422))
    for rank in range(size):
        (own, _), (_, (start, _)) = layout.pieces(rank)
        assert start >= 77
        whole = layout.whole(rank, layout.rows(rank), own)
        assert whole == ((0, 77), (77, 422))


def test_a_block_with_other_rows_is_an_error():
    layout = Layout.split((78, 342), 2)
    with pytest.raises(RuntimeError, match="rank 1 has a sequence of 211 rows"):
        layout.whole(1, 211, (0, 39))
