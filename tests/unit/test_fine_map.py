"""Choice by means of few tokens: the map against its definition, written out and in Triton."""

from dataclasses import replace

import pytest
import torch

from conftest import device_for
from flashomni.policies import make_policy
from flashomni.symbols import Grid
from flashomni.symbols.choice import op as choice
from flashomni.symbols.choice.op import Rule, fine_map

GRIDS = {
    "text first": Grid(500, 500, (0, 77), 32, 32),
    "text last, padded": Grid(
        500, 500, (400, 500), 32, 32, kv_len=torch.tensor([500, 429], dtype=torch.int32)
    ),
    "padded keys": Grid(300, 300, (0, 20), 32, 64, torch.tensor([300, 131], dtype=torch.int32)),
    "parts that are no power of two": Grid(609, 609, (0, 130), 96, 48),
    "one block": Grid(100, 100, (0, 20)),
    "one token": Grid(1, 1),
    "sequences differ": Grid(301, 523, block_m=64, block_n=32),
    "tiles without a mask": Grid(
        40, 1100, block_m=32, block_n=32, kv_len=torch.tensor([1100, 1025], dtype=torch.int32)
    ),
}  # fmt: skip


def tokens(grid, heads=2, kv_heads=1, head_dim=16, device="cpu"):
    """q and k that drift within blocks, so that parts of one differ."""
    made = []
    for seqlen, count in ((grid.seqlen_q, heads), (grid.seqlen_kv, kv_heads)):
        x = torch.randn(2, seqlen, count, head_dim, device=device)
        drift = torch.randn(2, -(-seqlen // 11), count, head_dim, device=device)
        made.append(x + 1.5 * drift.repeat_interleave(11, 1)[:, :seqlen])
    return made


def written_out(q, k, grid, size):
    """The map, part by part, in fp64 but for the means."""
    batch, _, heads, dim = q.shape
    out = torch.zeros(batch, heads, grid.num_q_blocks, grid.num_kv_blocks, dtype=torch.float64)
    padded_q = any(first > 0 and last == grid.seqlen_q for first, last in grid.text_spans)
    for b in range(batch):
        end_k = grid.seqlen_kv if grid.kv_len is None else int(grid.kv_len[b])
        end_q = end_k if padded_q and grid.kv_len is not None else grid.seqlen_q
        for h in range(heads):
            head = h // (heads // k.shape[2])
            keys = [k[b, s : min(s + size, end_k), head].mean(0).half().double()
                    for s in range(0, end_k, size)]  # fmt: skip
            where = torch.arange(0, end_k, size) // grid.block_n
            counts = torch.zeros(grid.num_q_blocks)
            for s in range(0, end_q, size):
                mean = q[b, s : min(s + size, end_q), h].mean(0) * dim**-0.5
                mass = (torch.stack(keys) @ mean.half().double()).softmax(0)
                out[b, h, s // grid.block_m].scatter_add_(0, where, mass)
                counts[s // grid.block_m] += 1
            out[b, h] /= counts.clamp(min=1)[:, None]
    return out.float()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_map_is_what_it_says(name, size):
    """Ragged blocks and parts, padding, grouped heads; rows sum to 1, those of padding to 0."""
    grid = GRIDS[name]
    if grid.block_m % size or grid.block_n % size:
        pytest.skip("the resolution does not divide the blocks")
    q, k = tokens(grid)
    got = fine_map(q, k, grid, size)
    torch.testing.assert_close(got, written_out(q, k, grid, size), atol=1e-5, rtol=1e-3)
    assert ((got.sum(-1) - 1).abs().lt(1e-5) | got.sum(-1).eq(0)).all()


def test_whole_blocks_are_the_pooled_map():
    """Parts of the size of a block: the map of block means, but for fp16."""
    grid = Grid(500, 500, (0, 77), 32, 32)
    q, k = tokens(grid)
    torch.testing.assert_close(
        fine_map(q, k, grid, 32), choice.pooled_map(q, k, grid), atol=2e-3, rtol=1e-2
    )


def test_chunks_of_rows_change_nothing(monkeypatch):
    from flashomni.symbols.choice import _fine

    grid = GRIDS["text last, padded"]
    q, k = tokens(grid)
    whole = fine_map(q, k, grid, 8)
    monkeypatch.setattr(_fine, "ENTRIES", 1)
    torch.testing.assert_close(fine_map(q, k, grid, 8), whole)


def test_a_finer_map_finds_what_means_hide():
    """Half of each key block is what a query looks for, the other half its opposite."""
    grid = Grid(512, 512, block_m=64, block_n=64)
    q, k = torch.zeros(1, 512, 1, 16), torch.zeros(1, 512, 1, 16)
    q[..., 0], k[:, 256:288, :, 0], k[:, 288:320, :, 0] = 4.0, 12.0, -12.0
    for size, expected in ((0, False), (8, True)):
        rule = Rule("count", count_kv=1, resolution=size)
        mask = choice.choose(q, k, grid, rule).kv_mask()
        assert bool(mask[..., 4].all()) is expected


def test_diagonal_and_text_rows():
    """Beside the heaviest blocks: those of the row's own tokens, and all for text."""
    grid = Grid(700, 700, (0, 70), 64, 32)
    q, k = tokens(grid)
    rule = Rule("count", count_kv=5)
    plain = choice.choose(q, k, grid, rule).kv_mask()
    with_own = choice.choose(q, k, grid, replace(rule, diagonal=True)).kv_mask()
    own = torch.arange(22) // 2 == torch.arange(11)[:, None]
    assert torch.equal(with_own, plain | own) and not torch.equal(with_own, plain)
    text = choice.choose(q, k, grid, replace(rule, text_rows=True)).kv_mask()
    assert text[:, :, :2].all() and torch.equal(text[:, :, 2:], plain[:, :, 2:])


def test_resolutions_are_checked():
    x, grid = torch.zeros(1, 96, 1, 16), Grid(96, 96, block_m=48, block_n=48)
    with pytest.raises(ValueError, match="resolution must be one of 0, 8, 16, 32, got 12"):
        Rule(resolution=12)
    with pytest.raises(ValueError, match=r"resolution must be one of 0, 8, 16, 32, got 4"):
        make_policy("topk", resolution=4)
    with pytest.raises(ValueError, match="resolution must divide blocks of 48 x 48, got 32"):
        choice.choose(x, x, grid, Rule("mass", tau_kv=0.1, resolution=32))


def test_huge_means_stay_numbers():
    """Beyond fp16 they are its largest: no infinity, no NaN in the map."""
    grid = Grid(128, 128, block_m=32, block_n=32)
    q, k = (1e6 * x for x in tokens(grid))
    assert fine_map(q, k, grid, 8).isfinite().all()


kernels = [
    pytest.mark.gpu,
    pytest.mark.triton,
]


def marked(test):
    """A test of the kernels: on a GPU, or in Triton's interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    for mark in kernels:
        test = mark(test)
    return test


def on(device, grid):
    return grid if grid.kv_len is None else grid.with_kv_len(grid.kv_len.to(device))


@marked
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("size", [8, 16, 32])
def test_kernels_make_the_map(name, size, monkeypatch):
    """The same masses; those of 8 tokens four query blocks at a time."""
    from flashomni.symbols.choice import _fine_launch

    device = device_for("portable")
    grid = on(device, GRIDS[name])
    if grid.block_m % size or grid.block_n % size:
        pytest.skip("the resolution does not divide the blocks")
    if size == 8:
        monkeypatch.setattr(_fine_launch, "MAX_BYTES", 1)
    q, k = tokens(grid, device=device)
    scratch = {"q_similarity": None, "k_similarity": None}
    found = _fine_launch.FineMap(q, k, grid, size, 0.3, False, scratch).chunks(4)
    got = torch.cat([masses.clone() for _, _, masses in found], 2)
    torch.testing.assert_close(got, fine_map(q, k, grid, size, 0.3), atol=1e-5, rtol=1e-3)


# (grid, heads, key heads, head_dim, dtype, the resolution of the interpreter)
SIZES = {
    "bf16": (Grid(200, 1111), 2, 1, 128, torch.bfloat16, 8),
    "fp16, padded": (
        Grid(261, 261, (200, 261), kv_len=torch.tensor([261, 0], dtype=torch.int32)),
        2, 2, 80, torch.float16, 16,
    ),
    "few keys a block": (Grid(130, 1100, block_n=64), 2, 1, 64, torch.bfloat16, 32),
}  # fmt: skip


@marked
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.slow
def test_kernels_make_the_map_of_models(name):
    """16-bit types, grouped heads and keys whose rows lie apart; all resolutions on a GPU."""
    from flashomni.symbols.choice import _fine_launch

    device = device_for("portable")
    grid, heads, kv_heads, head_dim, dtype, one = SIZES[name]
    grid = on(device, grid)
    q, k = (x.to(dtype) for x in tokens(grid, heads, kv_heads, head_dim, device))
    q, k = (torch.stack([x, x + 1], 3)[:, :, :, 0] for x in (q, k))
    assert not k.is_contiguous()
    for size in (8, 16, 32) if device.type == "cuda" else (one,):
        scratch = {"q_similarity": None, "k_similarity": None}
        found = _fine_launch.FineMap(q, k, grid, size, head_dim**-0.5, False, scratch).chunks(4)
        got = torch.cat([masses.clone() for _, _, masses in found], 2)
        # Means are rounded to fp16: where sums differ in their order, they may be one step apart.
        torch.testing.assert_close(got, fine_map(q, k, grid, size), atol=1e-4, rtol=1e-2)
        assert ((got.sum(-1) - 1).abs().lt(1e-4) | got.sum(-1).eq(0)).all()


@marked
@pytest.mark.parametrize("name", ["text first", "text last, padded", "one block"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("count", count_kv=3, resolution=8, diagonal=True, text_rows=True),
        Rule("mass", "and", tau_q=0.5, tau_kv=0.4, resolution=16, gate=0.1, text_rows=True),
        Rule("mass", "count", tau_kv=0.3, count_q=4, resolution=32, share_heads=True),
    ],
    ids=lambda rule: f"{rule.visit}-{rule.compute}-{rule.resolution}",
)
def test_kernels_choose_the_same(name, rule, monkeypatch):
    """The bits of the definition, in one chunk of rows and in several."""
    from flashomni.symbols.choice import _fine_launch

    device = device_for("portable")
    grid = on(device, GRIDS[name])
    if rule.resolution == 8:
        monkeypatch.setattr(_fine_launch, "MAX_BYTES", 1)
    q, k = tokens(grid, device=device)
    got = choice.choose(q, k, grid, rule, backend="portable")
    expected = choice.choose(q, k, grid, rule, backend="reference")
    differs = (got.kv_mask() ^ expected.kv_mask()).float().mean()
    if device.type == "cpu":  # the interpreter adds up like torch does
        assert differs == 0 and torch.equal(got.q_bits, expected.q_bits)
    else:
        assert differs < 1e-3
    assert 0 < float(got.density()) <= 1
