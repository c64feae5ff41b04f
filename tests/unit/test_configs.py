"""Configurations of kernels are data: where they are looked for, and what they say."""

from dataclasses import asdict
from importlib.resources import files

import pytest

from flashomni.kernels.common import configs

OPS = ("attention", "gemm_q", "gemm_o")
FILES = sorted(
    path.name.removesuffix(".json") for path in (files("flashomni.kernels") / "configs").iterdir()
)
HOPPER = ("nvidia-h200", "sm_90", configs.DEFAULT)


@pytest.mark.parametrize("name", FILES)
def test_files_hold_tiles_that_kernels_can_have(name):
    """Every entry of a portable kernel has every field; tiles are powers of two from 16 on."""
    tables = configs.read(name)
    assert tables
    for op in OPS:
        for entry in tables.get(f"{op}/portable", {}).values():
            config = configs.Config(**entry)
            assert all(type(value) is int for value in config[:5])
            assert type(config.anchored) is bool and (op == "attention" or not config.anchored)
            for tile in config[:3]:
                assert tile >= 16 and tile & (tile - 1) == 0


@pytest.mark.parametrize("op", OPS)
def test_default_has_every_head_dim_and_size(op):
    """A card that nobody has tuned never ends in a refusal."""
    for head_dim in (16, 32, 64, 128, 256):
        for num_bytes in (2, 4):
            config = configs.tiles(
                f"{op}/portable", ("no-card", "sm_120", "default"), head_dim, num_bytes
            )
            assert config == configs.tiles(f"{op}/portable", ("default",), head_dim, num_bytes)


def test_the_card_is_asked_first_then_its_architecture_then_the_default(monkeypatch):
    """Each entry for itself: a file holds only what differs."""
    mine = {"attention/portable": {"head_dim=64 bytes=2": {"tile_m": 1}}}
    known = {"nvidia-h200": mine, **{name: configs.read(name) for name in FILES}}
    monkeypatch.setattr(configs, "read", lambda name: known.get(name, {}))

    def ask(head_dim, num_bytes, where=HOPPER):
        return configs.entry("attention/portable", where, head_dim=head_dim, bytes=num_bytes)

    assert ask(64, 2) == {"tile_m": 1}
    assert ask(64, 2, HOPPER[1:]) == known["sm_90"]["attention/portable"]["head_dim=64 bytes=2"]
    assert ask(128, 2)["tile_m"] == 64  # of sm_90
    assert ask(32, 4) == known["default"]["attention/portable"]["head_dim=32 bytes=4"]
    with pytest.raises(
        NotImplementedError, match="head_dim=512 bytes=2 in nvidia-h200, sm_90, def"
    ):
        ask(512, 2)


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("NVIDIA RTX(TM) 6000/Ada ", "nvidia-rtx-tm-6000-ada"),
    ],
)
def test_names_of_cards_are_names_of_files(card, name):
    """Lower case, one dash between words, nothing that a file system minds."""
    assert configs.slug(card) == name


def test_files_are_read_once():
    """A launch costs no look at the disk."""
    assert configs.read("sm_90") is configs.read("sm_90")
    assert configs.read("nobody") == {}


@pytest.mark.parametrize(
    ("head_dim", "block_n", "expected"),
    [
        (64, 128, (64, 128, 2, 3, 3, (232, 40))),
        (40, 64, (64, 64, 2, 4, 4, (232, 40))),
        (128, 128, (128, 128, 2, 2, 2, (240, 24))),
        (72, 256, (128, 128, 2, 2, 2, (240, 24))),
        (128, 192, (128, 64, 2, 4, 4, (232, 40))),
        (256, 64, (256, 64, 1, 2, 2, (232, 40))),
        (136, 128, (256, 64, 1, 2, 2, (232, 40))),
    ],
)
def test_the_hopper_kernel_runs_as_it_was_measured(head_dim, block_n, expected):
    """On every card of compute capability 9.0."""
    sm90 = pytest.importorskip("flashomni.kernels.attention.sm90", reason="needs Triton 3.6")
    names = ("head_dim", "tile_n", "q_stages", "k_stages", "v_stages", "registers")
    want = dict(zip(names, expected, strict=True))
    for where in (HOPPER, ("nvidia-h100-80gb-hbm3", *HOPPER[1:])):
        found = asdict(sm90.choose_config(head_dim, block_n, where))
        assert {name: found[name] for name in names} == want


@pytest.mark.parametrize(
    ("head_dim", "columns"),
    [(8, 48), (48, 48), (64, 64), (72, 80), (80, 80), (96, 96), (104, 128), (128, 128), (192, 192)],
)
def test_scores_are_made_of_the_columns_that_there_are(head_dim, columns):
    """And of few zeros behind them: the tensor cores take multiples of 16 of the upper half."""
    sm90 = pytest.importorskip("flashomni.kernels.attention.sm90", reason="needs Triton 3.6")
    assert sm90.choose_config(head_dim, 128, HOPPER).columns(head_dim) == columns
