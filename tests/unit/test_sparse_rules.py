"""Sparse methods of papers, each against its paper's rule written out once more, token by token."""

import itertools
import math

import pytest
import torch
from policy_cases import inputs

from flashomni.engine import Recipe
from flashomni.policies import AttentionSite, make_policy
from flashomni.symbols import Grid
from flashomni.symbols.order import coordinates, permutation


def kv_mask(name, grid, q, k, **settings):
    """What the policy visits, of blocks without text: bool ``[B, H, Mb, Nb]``."""
    symbols = make_policy(name, **settings)(AttentionSite.alone(q, k, grid))
    mask, given = symbols.kv_mask(), grid.given_q_mask(q.device)
    assert mask[:, :, given].all() and mask[..., grid.given_kv_mask(q.device)].all()
    return mask


def by_blocks(pairs, grid):
    """Block pairs of which a pair of tokens is among ``pairs``, a bool ``[N, N]`` without text."""
    start = grid.seqlen_q - grid.num_generated  # text is first
    whole = torch.zeros(grid.num_q_blocks * grid.block_m, grid.num_kv_blocks * grid.block_n)
    stop = start + len(pairs)
    whole[start:stop, start:stop] = pairs.float()
    found = whole.unflatten(0, (-1, grid.block_m)).unflatten(2, (-1, grid.block_n)).amax((1, 3)) > 0
    device = found.device
    return found | grid.given_q_mask(device)[:, None] | grid.given_kv_mask(device)


def attention(q, k, b, h, keys=None):
    """Attention map of one head, in float64."""
    kv = h // (q.shape[2] // k.shape[2])
    score = q[b, :, h].double() @ k[b, :, kv].double().T * q.shape[-1] ** -0.5
    score[:, keys if keys is not None else score.shape[1] :] = -math.inf
    return score.softmax(-1)


def fewest(row, mass):
    """The heaviest entries, one after the other, until they hold ``mass`` of all."""
    chosen, total = set(), 0.0
    for index in sorted(range(len(row)), key=lambda i: -row[i]):
        if total >= mass * sum(row) - 1e-9:
            break
        chosen.add(index)
        total += row[index]
    return chosen


@pytest.mark.parametrize(
    ("shape", "tile", "window"),
    [
        ((5, 7, 9), (2, 3, 4), (3, 1, 2)),
        ((1, 20, 18), (1, 8, 8), (3, 3, 1)),
        ((6, 4, 4), (2, 4, 4), (9, 9, 9)),
    ],
    ids=str,
)  # fmt: skip
def test_sta_is_a_window_of_tiles(shape, tile, window):
    """Along each axis: the tiles around the query's own, moved inwards at the borders."""
    grid = Grid(*[math.prod(shape) + 21] * 2, (0, 21), block_m=16, block_n=32, shape=shape)
    tiles = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
    places = list(itertools.product(*map(range, shape)))

    def sees(query, key):
        for x, y, step, count, reach in zip(query, key, tile, tiles, window, strict=True):
            first = min(max(x // step - reach // 2, 0), max(count - reach, 0))
            if not first <= y // step < first + reach:
                return False
        return True

    pairs = torch.tensor([[sees(query, key) for key in places] for query in places])
    settings = {"tile": "x".join(map(str, tile)), "window": "x".join(map(str, window))}
    got = kv_mask("sta", grid, *inputs(grid), **settings)
    assert torch.equal(got, by_blocks(pairs, grid).expand_as(got))


def test_sta_where_a_tile_is_a_block():
    """As many tiles a row as the window has, at the borders too."""
    grid = Grid(7 * 64, 7 * 64, block_m=64, block_n=64, shape=(7, 8, 8))
    got = kv_mask("sta", grid, *inputs(grid), tile="1x8x8", window="3x1x1")
    assert (got.sum(-1) == 3).all() and got[0, 0, 0].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("first_frame", [True, False])
def test_svg_takes_the_template_that_errs_less(first_frame):
    """Band in frame order or in position order, decided on the sampled rows of each head."""
    frames, per_frame, text = 6, 40, 20
    count = frames * per_frame
    grid = Grid(count + text, count + text, (0, text), block_m=16, block_n=16)
    q, k = inputs(grid)
    # Heads 0 and 2 look for their own place at other times, the others along the frame.
    place = torch.randn(per_frame, 16).repeat(frames, 1) * 3
    q[:, text:, ::2] += place[:, None]
    k[:, text:, 0] += place
    density, rows = 0.5, 24
    width = (count + text) * (1 - math.sqrt(1 - (density - 2 * text / (count + text))))
    index = torch.arange(count)
    by_position = index % per_frame * frames + index // per_frame
    bands = []
    for order in (index, by_position):
        near = (order[:, None] - order).abs() <= width
        bands.append(near | ((index < per_frame) & first_frame))
    sampled = [(2 * i + 1) * count // (2 * rows) for i in range(rows)]
    got = kv_mask("svg", grid, q, k, frames=frames, density=density, rows=rows,
                  first_frame=first_frame)  # fmt: skip
    chosen = set()
    for b, h in itertools.product(range(2), range(4)):
        p, v = attention(q, k, b, h), k[b, :, h // 2].double()
        errors = []
        for band in bands:
            seen = torch.ones(count + text, count + text, dtype=torch.bool)
            seen[text:, text:] = band
            some = (p * seen) / (p * seen).sum(-1, keepdim=True)
            apart = (some @ v - p @ v)[[text + row for row in sampled]]
            errors.append(float(apart.square().mean()))
        best = errors.index(min(errors))
        chosen.add(best)
        order = (index, by_position)[best]
        least = by_blocks(bands[best], grid)
        most = ((order[:, None] - order).abs() <= width + 62) | ((index < per_frame) & first_frame)
        assert not (least & ~got[b, h]).any(), (b, h)
        assert not (got[b, h] & ~by_blocks(most, grid)).any(), (b, h)
    assert chosen == {0, 1}


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_xattention_sums_antidiagonals(stride, mass):
    """Squares of scores, one antidiagonal each; a softmax over a row of them; sums of blocks."""
    lengths = [500, 430]
    grid = Grid(500, 500, block_m=64, block_n=128, kv_len=torch.tensor(lengths, dtype=torch.int32))
    q, k = inputs(grid)
    q, k = q * 2, k.clone()
    got = kv_mask("xattention", grid, q, k, mass=mass, stride=stride)
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 12)) for x in (q, k))
    for b, h in itertools.product(range(2), range(4)):
        keys = k[b, :, h // 2].double()
        keys[lengths[b] :] = 0  # what padding holds has no say
        score = q[b, :, h].double() @ keys.T * 0.25 / stride
        squares = torch.zeros(512 // stride, 512 // stride, dtype=torch.float64)
        for s in range(stride):
            squares += score[stride - 1 - s :: stride, s::stride]
        squares[:, -(-lengths[b] // stride) :] = -math.inf
        share = squares.softmax(-1)[: -(-500 // stride)]
        share = torch.nn.functional.pad(share, (0, 0, 0, 512 // stride - len(share)))
        blocks = share.unflatten(0, (8, -1)).unflatten(2, (4, -1)).sum((1, 3))
        for i, row in enumerate(blocks.tolist()):
            assert set(got[b, h, i].nonzero()[:, 0].tolist()) == fewest(row, mass), (b, h, i)
    assert not got.all()


def test_xattention_is_the_same_in_pieces(monkeypatch):
    """The strided map is made a few query blocks at a time."""
    from flashomni.policies import xattention

    grid = Grid(900, 700, block_m=64, block_n=64)
    q, k = inputs(grid)
    whole = kv_mask("xattention", grid, q, k)
    monkeypatch.setattr(xattention, "CHUNK", 1)
    assert torch.equal(whole, kv_mask("xattention", grid, q, k))


@pytest.mark.parametrize("density", [0.1, 0.35])
def test_draft_keeps_a_share_of_the_low_resolution_map(density):
    """Frames pooled by 8 x 16; softmax; the heaviest pairs of a head, over all its rows."""
    frames, height = 3, 24
    grid = Grid(*[128 + frames * height * 16] * 2, (0, 128), shape=(frames, height, 16))
    q, k = inputs(grid)
    got = kv_mask("draft", grid, q, k, density=density)[:, :, 1:, 1:]

    def pooled(x):
        x = x[:, 128:].unflatten(1, (frames, height, 16)).permute(0, 1, 4, 2, 3, 5)
        x = x.flatten(0, 2).permute(0, 3, 1, 2)  # [B F H, D, rows, columns]
        small = torch.nn.functional.avg_pool2d(x, (8, 16)).flatten(2).mT
        return small.unflatten(0, (2, frames, -1)).transpose(1, 2).flatten(2, 3)

    small_q, small_k = pooled(q.permute(0, 1, 2, 3)), pooled(k).repeat_interleave(2, 1)
    p = (small_q @ small_k.mT * 0.25).softmax(-1)
    count = math.ceil(density * p.shape[-1] ** 2 - 1e-6)
    for b, h in itertools.product(range(2), range(4)):
        wanted = torch.zeros(p.shape[-1] ** 2, dtype=torch.bool)
        wanted[p[b, h].flatten().topk(count).indices] = True
        assert torch.equal(got[b, h].flatten(), wanted)


def test_draft_in_another_raster_keeps_its_density():
    """Blocks that are no patches have the mass of their patches: as many pairs are kept."""
    grid = Grid(
        50 + 3 * 21 * 40, 50 + 3 * 21 * 40, (0, 50), block_m=64, block_n=32, shape=(3, 21, 40)
    )
    got = kv_mask("draft", grid, *inputs(grid), density=0.25)
    free = (~grid.given_q_mask(got.device))[:, None] & ~grid.given_kv_mask(got.device)
    counts = (got & free).sum((-1, -2))
    assert (counts == math.ceil(0.25 * int(free.sum()))).all()


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize(("mass", "density"), [(0.3, 0.2), (0.8, 0.1)])
def test_jenga_keeps_mass_count_and_neighbours(mass, density, neighbours):
    """The heaviest blocks up to the first that passes the mass, at least so many; adjacent ones."""
    shape, text = (4, 6, 14), 16
    count = math.prod(shape)
    grid = Grid(count + text, count + text, (0, text), block_m=16, block_n=16, shape=shape)
    q, k = inputs(grid)
    settings = {"mass": mass, "density": density, "neighbours": neighbours}
    got = kv_mask("jenga", grid, q, k, **settings)[:, :, 1:, 1:]
    places = torch.tensor(list(itertools.product(*map(range, shape))))
    adjacent = (places[:, None] - places).abs().amax(-1) <= 1
    adjacent = by_blocks(adjacent, grid)[1:, 1:]
    blocks = count // 16
    for b, h in itertools.product(range(2), range(4)):
        mean_q = q[b, text:, h].unflatten(0, (-1, 16)).mean(1)
        mean_k = k[b, text:, h // 2].unflatten(0, (-1, 16)).mean(1)
        for i, row in enumerate((mean_q @ mean_k.T * 0.25).softmax(-1).tolist()):
            total, wanted = 0.0, set()
            for rank, j in enumerate(sorted(range(blocks), key=lambda j: -row[j])):
                if total <= mass or rank < math.ceil(density * blocks):
                    wanted.add(j)
                total += row[j]
            wanted |= set(adjacent[i].nonzero()[:, 0].tolist()) if neighbours else set()
            assert set(got[b, h, i].nonzero()[:, 0].tolist()) == wanted, (b, h, i)
    assert not got.all()


def test_dit_fast_attn_gives_each_head_the_narrowest_window_it_bears():
    """The first band whose relative squared error is below the threshold; all keys if none is."""
    text, count = 32, 480
    grid = Grid(count + text, count + text, (0, text), block_m=32, block_n=32)
    q, k = torch.randn(2, 512, 4, 16), torch.randn(2, 512, 2, 16)
    wave = torch.arange(512)[:, None] * torch.logspace(-1, -2.5, 8)
    turn = torch.cat([wave.cos(), wave.sin()], -1)
    for h, strength in enumerate((0.1, 3.0, 1.5, 8.0)):  # how much a head looks at what is near
        q[:, :, h] += strength * turn
    k += 3 * turn[:, None]
    window, threshold = 0.1, 0.05
    got = kv_mask(
        "dit_fast_attn", grid, q, k, window=window, wider=1, threshold=threshold, rows=480
    )
    index, seen = torch.arange(count), set()
    for b, h in itertools.product(range(2), range(4)):
        p, v = attention(q, k, b, h), k[b, :, h // 2].double()
        wanted = torch.ones_like(got[b, h])
        taken = None
        for reach in (window * count / 2, window * count):
            pairs = (index[:, None] - index).abs() <= reach
            mask = torch.ones(512, 512, dtype=torch.bool)
            mask[text:, text:] = pairs
            some = (p * mask) / (p * mask).sum(-1, keepdim=True) @ v
            error = (some - p @ v)[text:].square().sum() / (p @ v)[text:].square().sum()
            if error <= threshold:
                wanted, taken = by_blocks(pairs, grid), reach
                break
        seen.add(taken)
        assert torch.equal(got[b, h], wanted), (b, h)
    assert len(seen) >= 2 and None in seen


@pytest.mark.parametrize("mass", [0.6, 0.9])
def test_spargeattn_tests_the_mass_of_similar_blocks_alone(mass):
    """128 x 64: blocks of unlike tokens are left out of the softmax, and visited all the same."""
    gate = 0.35
    grid = Grid(500, 500, block_m=128, block_n=64)
    q, k = inputs(grid)
    q[:, 128:256] += 3  # alike
    k[:, :320] += 2 * torch.randn(2, 5, 2, 16).repeat_interleave(64, 1)
    got = kv_mask("spargeattn", grid, q, k, mass=mass, similarity_gate=gate, protect_text=False)

    def blocks(x, size):
        return [x[i : i + size] for i in range(0, len(x), size)]

    def alike(x):
        unit = x / x.norm(dim=-1, keepdim=True)
        return float((unit @ unit.T).mean()) >= gate

    unlike_rows = unlike_columns = 0
    for b, h in itertools.product(range(2), range(4)):
        rows, columns = blocks(q[b, :, h], 128), blocks(k[b, :, h // 2], 64)
        score = torch.stack([x.mean(0) for x in rows]) @ torch.stack([x.mean(0) for x in columns]).T
        unlike = [j for j, x in enumerate(columns) if not alike(x)]
        score[:, unlike] = -math.inf
        share = (score * 0.25).softmax(-1).tolist()
        unlike_columns += len(unlike)
        for i, row in enumerate(rows):
            wanted = fewest(share[i], mass) | set(unlike)
            if not alike(row):
                wanted, unlike_rows = set(range(len(columns))), unlike_rows + 1
            assert set(got[b, h, i].nonzero()[:, 0].tolist()) == wanted, (b, h, i)
    assert 0 < unlike_rows < 32 and 0 < unlike_columns < 64 and not got.all()


@pytest.mark.parametrize("name", ["vsa", "sla"])
def test_trained_methods_are_refused_with_the_reason(name):
    """As a policy and as a recipe: nobody gets an unknown name for an answer."""
    for make in (make_policy, Recipe.of):
        with pytest.raises(NotImplementedError, match=f"{name} cannot be put on .* trains .*xatt"):
            make(name)


@pytest.mark.parametrize("order", ["tile", "hilbert"])
def test_tiles_and_neighbours_are_those_of_the_picture_in_any_order(order):
    """The pairs of tokens of raster order, moved to where the tokens are."""
    shape = (4, 8, 24)
    grid = Grid(777, 777, (0, 9), block_m=16, block_n=32, shape=shape, order=order)
    there = permutation(shape, order)
    place = coordinates(shape, "raster")
    tile = place // torch.tensor([1, 2, 8])[:, None]
    near = torch.ones(768, 768, dtype=torch.bool)
    for axis, count, reach in zip(tile, (4, 4, 3), (3, 2, 1), strict=True):
        first = (axis - reach // 2).clamp(0, count - reach)[:, None]
        near &= (axis >= first) & (axis < first + reach)
    adjacent = ((place[:, :, None] - place[:, None]).abs() <= 1).all(0)
    for name, settings, pairs in (
        ("sta", {"tile": "1x2x8", "window": "3x2x1"}, near),
        ("jenga", {"mass": 0.0, "density": 0.0}, adjacent),
    ):
        got = kv_mask(name, grid, *inputs(grid), **settings)
        wanted = by_blocks(pairs[there][:, there], grid)
        extra = (got & ~wanted).sum(-1).amax()  # the heaviest block of a row
        assert not (wanted & ~got).any() and extra <= (name == "jenga") and not got.all(), name
