"""Cards of one host, with NCCL: `two_cards.py` runs, this reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_cards.py")
COUNT = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(COUNT < 2, reason="needs two cards")]


def run(folder, size):
    """Groups of processes on as many groups of cards, each with its share of the models."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(COUNT)))
    cards, groups, processes, outs = visible.split(","), COUNT // size, [], []
    for group in range(groups):
        own = ",".join(cards[group * size : (group + 1) * size])
        for rank in range(size):
            out = folder / f"{size}-{group}-{rank}.json"
            command = [sys.executable, SCRIPT, str(rank), folder / f"store{size}-{group}", out]
            shares = ["--size", str(size), "--share", str(group), "--of", str(groups)]
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": own}
            processes.append(subprocess.Popen([*command, *shares], env=env))
            outs.append((rank, out))
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes)
    found = [{} for _ in range(size)]
    for rank, out in outs:
        found[rank] |= json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    found = run(folder, 2)
    four = run(folder, 4) if COUNT >= 4 else [{}, {}]
    return [each | more for each, more in zip(found, four, strict=False)]


def test_several_cards_are_within_twice_torchs_own_error(ranks):
    """bf16 against fp32, every adapter that shares; and all cards have the same bits."""
    assert ranks[0]
    assert not [name for name, figures in ranks[0].items() if "error" in figures]
    for found in ranks:
        for name, figures in found.items():
            assert figures["lossless"]["two"] <= 2 * figures["lossless"]["torch"], name
            assert figures["lossless"]["alike"] and figures["topk"]["alike"], name


def test_several_cards_skip_what_one_does(ranks):
    """Tiles near the edge may be chosen otherwise where a product was rounded otherwise."""
    for found in ranks:
        for name, figures in found.items():
            assert figures["topk"]["between"] <= 4 * figures["topk"]["torch"], name


def test_branches_on_two_cards_have_the_bits_of_one(ranks):
    cfg = [name for name in ranks[0] if name.endswith(" cfg=2")]
    assert cfg
    for found in ranks:
        for name in cfg:
            assert not found[name]["lossless"]["between"] and not found[name]["topk"]["between"]


def test_recordings_of_several_cards_have_the_bits(ranks):
    """Those of calls that share a sequence; shared branches are not recorded, and it says so."""
    for found in ranks:
        for name, figures in found.items():
            for recipe in ("lossless", "topk"):
                one = figures[recipe]
                assert one["graphs"], name
                assert one["replays"] or one["why"], name
        assert found["FluxTransformer2DModel"]["lossless"]["replays"]
