"""Policies on odd sequences: text anywhere or nowhere, geometry, one block."""

from dataclasses import replace

import pytest
import torch
from policy_cases import NAMES, NO_TEXT, SET, inputs, low_mass_loop, progress

from flashomni.kernels import sparse_attention
from flashomni.policies import AttentionSite, Policy, make_policy, policies, require_text
from flashomni.symbols import Grid, unpack_bits
from flashomni.symbols.choice.op import pooled_map
from flashomni.symbols.order import coordinates

TEXT_LESS = [name for name in NAMES if not policies()[name].needs_text]
ODD = {
    "one token": Grid(1, 1),
    "one text token": Grid(1, 1, (0, 1)),
    "one block": Grid(100, 100, (0, 20)),
    "all text": Grid(300, 300, (0, 300)),
    "all text but one": Grid(300, 300, (0, 299)),
    "vision in text blocks only": Grid(200, 200, (0, 100), 64, 256),
    "no vision query block": Grid(200, 200, (0, 100), 256, 64),
    "text last, ragged": Grid(333, 333, (300, 333), 64, 64),
    "text in the middle": Grid(600, 600, spans=(("text", 200, 290),)),
    "texts at both ends": Grid(600, 600, (0, 50), 64, 32, spans=(("text", 530, 600),)),
    "text and reference": Grid(900, 900, (0, 77), 64, 64, spans=(("reference", 500, 900),)),
    "geometry": Grid(6 * 80 + 33, 6 * 80 + 33, (480, 513), 32, 32, shape=(6, 8, 10)),
    "geometry around a text": Grid(
        530, 530, block_m=32, block_n=64, shape=(6, 8, 10), spans=(("text", 100, 150),)
    ),
}


@pytest.mark.parametrize("grid", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", NAMES)
def test_odd_sequences_give_valid_symbols(name, grid):
    """Ragged, tiny, without vision, text anywhere: valid symbols, or an error of one sentence."""
    q, k = inputs(grid)
    site = AttentionSite.alone(q, k, grid, progress())
    policy = make_policy(name, **SET.get(name, {}))
    symbols = policy(site)
    assert (symbols.batch, symbols.num_heads) == (2, 4) and symbols.grid is grid
    assert symbols.q_mask()[..., grid.text_q_mask(q.device)].all()
    assert symbols.kv_mask().any(-1).all()
    for start, stop in grid.text_kv_ranges:
        assert symbols.kv_mask()[..., start:stop].all()
    for bits, count in (
        (symbols.q_bits, grid.num_q_blocks),
        (symbols.kv_bits, grid.num_kv_blocks),
    ):  # bits past the last block stay 0: kernels count on it
        assert not unpack_bits(bits, 8 * bits.shape[-1])[..., count:].any()
    known = policy.known_fraction(grid)
    assert known is None or float(symbols.q_density()) == pytest.approx(known)
    out = sparse_attention(q, k, k, symbols, backend="reference")
    computed = symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., : grid.seqlen_q]
    assert torch.isfinite(out.transpose(1, 2)[computed]).all()


def test_who_needs_text_says_so_and_names_who_does_not():
    """An attribute of the class; the error lists every policy that does without."""
    assert TEXT_LESS == NAMES

    class Reads(Policy):
        name, needs_text = "reads", True

    require_text(Reads(), ODD["one block"])
    with pytest.raises(ValueError, match=f"policy reads needs .* {', '.join(TEXT_LESS)} do not"):
        require_text(Reads(), NO_TEXT)


def light(mass, tau):
    """Which entries of each ``[B, H, N]`` row are cached, by the loop."""
    flat = mass.flatten(0, 1).tolist()
    chosen = [[i in low_mass_loop(row, tau) for i in range(len(row))] for row in flat]
    return torch.tensor(chosen).view(mass.shape)


@pytest.mark.parametrize("combine", ["and", "mean", "c", "g"])
@pytest.mark.parametrize("has_guide", [False, True])
def test_flashomni_without_text_reads_columns_and_cross_attention(combine, has_guide):
    """C is the mass of a block's column over all rows; G comes from the guide, if there is one."""
    grid, tau = Grid(500, 500, block_m=32, block_n=32), 0.6
    q, k = inputs(grid)
    guide = torch.rand(2, 4, grid.num_q_blocks, 7).mul(9).softmax(-1) if has_guide else None
    policy = make_policy("flashomni", tau_q=tau, tau_kv=0.0, power=0.0, combine=combine)
    site = AttentionSite.alone(q, k, grid, guide=guide)
    if combine == "g" and not has_guide:
        with pytest.raises(ValueError, match=r"combine='g' needs text tokens .* or a map of cross"):
            policy(site)
        return
    given = pooled_map(q, k, grid).sum(-2)
    cached = light(given, tau)
    if has_guide:
        guided = guide.softmax(-2).sum(-1)
        shares = [mass / mass.sum(-1, keepdim=True) for mass in (given, guided)]
        cached = {
            "and": cached & light(guided, tau),
            "mean": light(shares[0] + shares[1], tau),
            "c": cached,
            "g": light(guided, tau),
        }[combine]
    assert torch.equal(policy(site).q_mask(), ~cached)
    assert 0 < cached.float().mean() < 1


def test_a_guide_of_another_shape_is_refused():
    grid = Grid(500, 500)
    site = AttentionSite.alone(*inputs(grid), grid, guide=torch.rand(2, 4, 3, 7))
    with pytest.raises(
        ValueError,
        match=r"guide must be float32 .* = \[2, 4, 4\], got torch.float32 \[2, 4, 3, 7\]",
    ):
        make_policy("flashomni")(site)


def test_flashomni_reads_two_texts_like_one_text():
    """Texts at both ends guide like their blocks do: C and G sum over all of them."""
    grid = ODD["texts at both ends"]
    q, k = inputs(grid)
    policy = make_policy("flashomni", tau_q=0.5, tau_kv=0.0, power=0.0, combine="g")
    got = policy(AttentionSite.alone(q, k, grid)).q_mask()
    attention = pooled_map(q, k, grid)
    (vision,) = grid.vision_q_ranges
    columns = [i for span in grid.text_kv_ranges for i in range(*span)]
    for b in range(2):
        for h in range(4):
            mass = attention[b, h][slice(*vision)][:, columns].softmax(0).sum(-1)
            light = low_mass_loop([float(x) for x in mass], 0.5)
            expected = [i not in light for i in range(len(mass))]
            assert got[b, h, slice(*vision)].tolist() == expected
    assert not got.all()


def test_radial_reads_the_frames_off_the_grid():
    """The grid's frames are what frames= would say; without either, the cure is named."""
    plain, shaped = (Grid(640, 640, (0, 40), 32, 32, shape=s) for s in (None, (6, 10, 10)))
    q, k = inputs(plain)
    by_setting = make_policy("radial", frames=6)(AttentionSite.alone(q, k, plain))
    by_grid = make_policy("radial")(AttentionSite.alone(q, k, shaped))
    assert torch.equal(by_setting.kv_bits, by_grid.kv_bits) and not by_grid.kv_mask().all()
    with pytest.raises(
        ValueError, match=r"frames of policy radial must be set \(radial:frames=16\)"
    ):
        make_policy("radial")(AttentionSite.alone(q, k, plain))
    tiled = replace(plain, order="tile")
    with pytest.raises(ValueError, match="policy radial needs the shape of tokens in order tile"):
        make_policy("radial", frames=6)(AttentionSite.alone(q, k, tiled))


@pytest.mark.parametrize("order", ["tile", "hilbert"])
@pytest.mark.parametrize("policy", ["window", "radial"])
def test_static_policies_see_through_an_order(policy, order):
    """What is near in space is visited whatever the order; compact blocks leave out more."""
    shape, settings = (6, 12, 12), {"window": {"reach": 0.1}, "radial": {"width": 0.2}}[policy]
    grid = Grid(864 + 21, 864 + 21, (0, 21), 16, 16, shape=shape, order=order)
    q, k = inputs(grid)
    mask = make_policy(policy, **settings)(AttentionSite.alone(q, k, grid)).kv_mask()[1, 3]
    place = coordinates(shape, order)
    gap = (place[:, :, None] - place[:, None]).abs()
    if policy == "window":
        near = (gap <= 0.1 * torch.tensor(shape)[:, None, None]).all(0)
    else:
        reach = 0.2 * 144 / 2 ** gap[0].clamp(min=1).float().log2().floor()
        near = (gap[0] == 0) | (gap[1] * 12 <= reach) | (place[0] == 0)
    block = (torch.arange(864) + 21) // 16
    assert mask[block[:, None].expand(864, 864)[near], block.expand(864, 864)[near]].all()
    assert not mask[2:].all()
    text = mask[:2].all() and mask[:, :2].all()
    assert text


@pytest.mark.parametrize("text", [(0, 0), (0, 21), (300, 321)])
def test_window_sees_its_neighbours_in_space(text):
    """No pair of tokens within reach in time, height and width is left out; far blocks are."""
    shape, reach = (3, 10, 10), 0.2
    length = 300 + text[1] - text[0]
    grid = Grid(length, length, text, 16, 16, shape=shape)
    symbols = make_policy("window", reach=reach)(AttentionSite.alone(*inputs(grid), grid))
    mask = symbols.kv_mask()[1, 3]
    offset = text[1] if text[0] == 0 else 0
    place = torch.cartesian_prod(*map(torch.arange, shape))
    near = ((place[:, None] - place).abs() <= reach * torch.tensor(shape)).all(-1)
    block = (torch.arange(300) + offset) // 16
    assert mask[block[:, None].expand(300, 300)[near], block.expand(300, 300)[near]].all()
    assert not mask.all() and not mask[int(block[0]) + 1, int(block[250])]
