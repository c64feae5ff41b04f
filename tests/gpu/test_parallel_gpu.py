"""Two cards of one host, with NCCL: `two_cards.py` runs, this reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_cards.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    outs = [folder / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), folder / "store", out])
        for rank, out in enumerate(outs)
    ]
    try:
        codes = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0]
    return [json.loads(out.read_text()) for out in outs]


def test_two_cards_are_within_twice_torchs_own_error(ranks):
    """bf16 against fp32, every adapter; and both cards have the same bits."""
    assert ranks[0]
    assert not [name for name, figures in ranks[0].items() if "error" in figures]
    for found in ranks:
        for name, figures in found.items():
            assert figures["lossless"]["two"] <= 2 * figures["lossless"]["torch"], name
            assert figures["lossless"]["alike"] and figures["topk"]["alike"], name


def test_two_cards_skip_what_one_does(ranks):
    """Tiles near the edge may be chosen otherwise where a product was rounded otherwise."""
    for found in ranks:
        for name, figures in found.items():
            assert figures["topk"]["between"] <= 4 * figures["topk"]["torch"], name
