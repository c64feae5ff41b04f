"""Every registered policy keeps the contract; then what is particular to each."""

import json
from dataclasses import dataclass

import pytest
import torch
from policy_cases import GRIDS, NAMES, NO_TEXT, SET, inputs, low_mass_loop, progress

import flashomni
from conftest import call
from flashomni.engine import Recipe
from flashomni.policies import (
    POLICIES,
    AttentionSite,
    Policy,
    fields,
    make_policy,
    policies,
)
from flashomni.policies import policy as policy_decorator
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import heaviest, low_mass, pooled_map


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, grid):
    """Right shape, text kept, no empty row, deterministic, known fraction true."""
    q, k = inputs(grid)
    policy = make_policy(name, **SET.get(name, {}))
    symbols = policy(AttentionSite.alone(q, k, grid, progress()))
    assert symbols.grid == grid and (symbols.batch, symbols.num_heads) == (2, 4)
    q_mask, kv_mask = symbols.q_mask(), symbols.kv_mask()
    assert q_mask[..., grid.text_q_mask(q.device)].all()
    assert kv_mask[..., slice(*grid.text_kv_ranges[0])].all() and kv_mask.any(-1).all()
    again = policy(AttentionSite.alone(q, k, grid, progress()))
    assert torch.equal(symbols.q_bits, again.q_bits)
    assert torch.equal(symbols.kv_bits, again.kv_bits)
    known = policy.known_fraction(grid)
    if known is not None:
        assert float(symbols.q_density()) == pytest.approx(known)
    if not policy.caches:
        assert q_mask.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_chooses_nearly_the_same(name, dtype):
    """Large values too: no sum overflows, and the density is that of fp32."""
    grid = GRIDS["text first"]
    q, k = (x * 20 for x in inputs(grid))
    policy = make_policy(name, **SET.get(name, {}))
    full = policy(AttentionSite.alone(q, k, grid, progress()))
    half = policy(AttentionSite.alone(q.to(dtype), k.to(dtype), grid, progress()))
    for mine, theirs in ((half.q_mask(), full.q_mask()), (half.kv_mask(), full.kv_mask())):
        assert (mine != theirs).float().mean() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_never_synchronises(name):
    """One graph without a break: no value of a tensor is read on the way."""
    torch.compiler.reset()  # each policy compiles the same function anew
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    policy = make_policy(name, **SET.get(name, {}))

    def run(q, k, t):
        symbols = policy(AttentionSite.alone(q, k, grid, t))
        return symbols.q_bits, symbols.kv_bits

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, progress()), run(q, k, progress()), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_never_synchronises_on_a_gpu(name):
    """CUDA itself reports every hidden wait as an error."""
    grid = GRIDS["text first"]
    q, k = (x.cuda() for x in inputs(grid))
    t = progress().cuda()
    make_policy(name, **SET.get(name, {}))(AttentionSite.alone(q, k, grid, t))
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_policy(name, **SET.get(name, {}))(AttentionSite.alone(q, k, grid, t))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_choice_can_be_captured(name):
    """In a CUDA graph: other queries and keys in the same memory give their own symbols."""
    grid = GRIDS["text first"]
    q, k = (x.cuda() for x in inputs(grid))
    t, policy = progress().cuda(), make_policy(name, **SET.get(name, {}))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        policy(AttentionSite.alone(q, k, grid, t))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        symbols = policy(AttentionSite.alone(q, k, grid, t))
    q.copy_(q.roll(50, 1))
    k.copy_(-k)
    graph.replay()
    torch.cuda.synchronize()
    expected = policy(AttentionSite.alone(q, k, grid, t))
    assert torch.equal(symbols.q_bits, expected.q_bits)
    assert torch.equal(symbols.kv_bits, expected.kv_bits)


@pytest.mark.parametrize("name", NAMES)
def test_settings_round_trip_through_json(name):
    """to_dict holds JSON values and gives an equal policy back."""
    policy = make_policy(name, **SET.get(name, {}))
    data = json.loads(json.dumps(policy.to_dict()))
    assert make_policy(**data) == policy


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), -7.0, 1e9, "much", None, [1]])
def test_settings_out_of_range_are_refused_by_name(name, bad):
    """Every setting of every policy: the error names it and shows what was given."""
    for field in fields(policies()[name]):
        if bad is None and field.default is None:
            continue
        with pytest.raises(ValueError, match=rf"{field.name} must be .*got"):
            make_policy(name, **{field.name: bad})


def test_unknown_policies_and_settings_list_the_known():
    """The error is the documentation."""
    with pytest.raises(ValueError, match=f"policy must be one of {', '.join(NAMES)}, got 'magic'"):
        make_policy("magic")
    with pytest.raises(ValueError, match="policy topk takes q_density, kv_density, share_heads"):
        make_policy("topk", density=0.5)
    with pytest.raises(ValueError, match="policy cached takes no settings, got 'order'"):
        make_policy("cached", order=1)


def test_flashomni_is_the_rule_of_the_paper():
    """C, G, both CDF tests and the kv rule, against loops over heads and blocks."""
    grid = GRIDS["text first"]
    q, k = inputs(grid, kv_heads=4)
    tau_q, tau_kv, t = 0.6, 0.4, 0.8
    symbols = make_policy("flashomni", tau_q=tau_q, tau_kv=tau_kv, power=2.0)(
        AttentionSite.alone(q, k, grid, progress(t))
    )
    attention = pooled_map(q, k, grid)
    cached_something = False
    for b in range(2):
        for h in range(4):
            p = attention[b, h]
            given = [float(p[0, i]) for i in range(1, 4)]  # one text block, three of vision
            beta = torch.softmax(p[1:, 0], 0)
            guided = [float(value) for value in beta]
            light = low_mass_loop(given, tau_q * t**2) & low_mass_loop(guided, tau_q * t**2)
            expected = [True] + [i not in light for i in range(3)]
            assert symbols.q_mask()[b, h].tolist() == expected
            cached_something |= bool(light)
            for i in range(1, 4):
                skipped = low_mass_loop([float(x) for x in p[i]], tau_kv * t**2) - {0}
                assert symbols.kv_mask()[b, h, i].tolist() == [j not in skipped for j in range(4)]
            assert symbols.kv_mask()[b, h, 0].all()
    assert cached_something


@pytest.mark.parametrize("combine", ["and", "mean", "c", "g"])
@pytest.mark.parametrize("grid", [GRIDS["text last"], Grid(900, 900, (0, 200))], ids=str)
def test_flashomni_reads_c_and_g_off_the_map(combine, grid):
    """C sums text rows, G the softmax over vision of text columns; each way to combine them."""
    q, k = inputs(grid)
    tau = 0.45
    policy = make_policy("flashomni", tau_q=tau, tau_kv=0.0, power=0.0, combine=combine)
    got = policy(AttentionSite.alone(q, k, grid, progress())).q_mask()
    attention = pooled_map(q, k, grid)
    text, vision = range(*grid.text_q_ranges[0]), list(range(*grid.vision_q_ranges[0]))
    some_cached = False
    for b in range(2):
        for h in range(4):
            p = attention[b, h]
            given = [sum(float(p[j, i]) for j in text) for i in vision]
            beta = {j: torch.softmax(torch.stack([p[i, j] for i in vision]), 0) for j in text}
            guided = [sum(float(beta[j][n]) for j in text) for n in range(len(vision))]
            mean = [c / sum(given) + g / sum(guided) for c, g in zip(given, guided, strict=True)]
            light = {
                "and": low_mass_loop(given, tau) & low_mass_loop(guided, tau),
                "mean": low_mass_loop(mean, tau),
                "c": low_mass_loop(given, tau),
                "g": low_mass_loop(guided, tau),
            }[combine]
            assert got[b, h, vision].tolist() == [n not in light for n in range(len(vision))]
            some_cached |= bool(light)
    assert some_cached


@pytest.mark.parametrize(
    ("less", "more"),
    [({"tau_q": 0.3}, {"tau_q": 0.9}), ({"tau_kv": 0.1}, {"tau_kv": 0.7})],
)
def test_flashomni_is_monotone(less, more):
    """A larger threshold, or a later step, never computes what a smaller one left out."""
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    a, b = (
        make_policy("flashomni", **s)(AttentionSite.alone(q, k, grid, progress()))
        for s in (less, more)
    )
    early = make_policy("flashomni", **more)(AttentionSite.alone(q, k, grid, progress(0.4)))
    for dense, sparse in ((a, b), (early, b)):
        assert not (sparse.q_mask() & ~dense.q_mask()).any()
        assert not (sparse.kv_mask() & ~dense.kv_mask()).any()
    assert float(b.density()) < float(a.density())


def test_flashomni_options():
    """share_heads gives equal heads; the gate keeps incoherent blocks; no text is refused."""
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    shared = make_policy("flashomni", tau_q=0.9, share_heads=True)(
        AttentionSite.alone(q, k, grid, progress())
    )
    assert (shared.q_mask() == shared.q_mask()[:, :1]).all() and not shared.q_mask().all()
    gated = make_policy("flashomni", tau_q=0.9, tau_kv=0.9, similarity_gate=1.0)
    assert float(gated(AttentionSite.alone(q, k, grid, progress())).density()) == 1.0
    densities = {
        combine: float(
            make_policy("flashomni", tau_q=0.6, combine=combine)(
                AttentionSite.alone(q, k, grid, progress())
            ).q_density()
        )
        for combine in ("and", "c", "g", "mean")
    }
    assert densities["and"] >= max(densities["c"], densities["g"])


@pytest.mark.parametrize("name", NAMES)
def test_no_policy_needs_text(name):
    """Models without text in their self-attention are served too."""
    symbols = make_policy(name, **SET.get(name, {}))(
        AttentionSite.alone(*inputs(NO_TEXT), NO_TEXT, progress())
    )
    assert symbols.kv_mask().any(-1).all()


@pytest.mark.parametrize("q_density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kv_density", [0.25, 0.6, 1.0])
def test_topk_gives_the_density_asked_for(q_density, kv_density):
    """To within half a block, in every head and row."""
    grid = Grid(1300, 1300, (0, 100), block_m=64, block_n=64)
    q, k = inputs(grid)
    policy = make_policy("topk", q_density=q_density, kv_density=kv_density)
    symbols = policy(AttentionSite.alone(q, k, grid, progress()))
    half = 0.5 / grid.num_q_blocks + 1e-6
    assert (symbols.q_mask().float().mean(-1) - q_density).abs().max() <= half
    assert (symbols.kv_mask().float().mean(-1) - kv_density).abs().max() <= half


def test_selection_helpers():
    """low_mass never drops an entry heavier than tau; heaviest takes exactly so many."""
    mass = torch.tensor([[0.05, 0.6, 0.05, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert low_mass(mass, 0.1).tolist() == [[True, False, True, False], [False] * 4]
    assert low_mass(mass, 0.0).sum() == 0
    assert low_mass(mass, torch.tensor(0.5))[1].sum() == 2
    assert heaviest(mass, 2)[0].tolist() == [False, True, False, True]
    assert heaviest(mass, 0).sum() == 0


def test_spargeattn_keeps_the_mass():
    """What a row visits holds at least the asked share of its pooled attention."""
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    symbols = make_policy("spargeattn", mass=0.7, similarity_gate=-1.0)(
        AttentionSite.alone(q, k, grid, progress())
    )
    kept = (pooled_map(q, k, grid) * symbols.kv_mask()).sum(-1)
    assert (kept >= 0.7 - 1e-5).all() and float(symbols.kv_density()) < 1


def test_window_sees_its_neighbours():
    """A band around the diagonal, text rows and columns full, bits shared by all heads."""
    grid = Grid(1280, 1280, (0, 128))
    symbols = make_policy("window", reach=0.1)(AttentionSite.alone(*inputs(grid), grid, progress()))
    row = symbols.kv_mask()[1, 3, 5].nonzero()[:, 0].tolist()
    assert row == [0, 4, 5, 6] and symbols.kv_mask()[0, 0, 0].all()
    assert symbols.kv_bits.stride()[:2] == (0, 0)


def test_radial_narrows_with_the_distance_in_time():
    """Own and first frame whole; then the reach halves with each doubling of the distance."""
    grid = Grid(8 * 640, 8 * 640, block_m=32, block_n=32)  # 8 frames of 20 blocks
    symbols = make_policy("radial", frames=8, width=0.4)(
        AttentionSite.alone(*inputs(grid), grid, progress())
    )
    row = symbols.kv_mask()[0, 0, 130].view(8, 20).sum(-1).tolist()  # frame 6, block 10 of it
    assert row[0] == 20 and row[6] == 20
    assert row[5] == row[7] > row[4] > row[2] == row[1] > 0
    whole = make_policy("radial", frames=1)(AttentionSite.alone(*inputs(grid), grid, progress()))
    assert whole.kv_mask().all()


def test_a_site_alone_and_in_full():
    """What a policy may ask for: of a layer on its own, or what the engine knows."""
    grid = GRIDS["text first"]
    q, k = inputs(grid)
    alone = AttentionSite.alone(q, k, grid)
    assert (alone.layer, alone.num_layers, list(alone.heads)) == (0, 1, [0, 1, 2, 3])
    assert float(alone.progress) == 1.0 and alone.softmax_scale == 0.25 and alone.guide is None
    told = AttentionSite.alone(q, k, grid, layer=3, num_layers=7, branch="uncond")
    assert (told.layer, told.num_layers, told.branch) == (3, 7, "uncond")
    with pytest.raises(AttributeError):
        told.layer = 4


def test_the_engine_tells_a_policy_where_it_is(no_grad, tiny):
    """Layer by layer, step by step; the same heads and scale at each."""
    seen = []

    @policy_decorator("looks")
    @dataclass(frozen=True)
    class Looks(Policy):
        def __call__(self, site):
            seen.append(site)
            return Symbols.cached(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)

    POLICIES.remove("looks")
    model, arguments = tiny
    recipe = Recipe.of(Looks(), interval=2, warmup=0.0)
    with flashomni.accelerate(model, recipe, backend="reference") as engine:
        for step in range(4):
            engine.step(step, 6, "cond")
            call(model, arguments)
    count = seen[0].num_layers
    order = dict.fromkeys((site.step, site.layer) for site in seen)  # a block may attend twice
    assert list(order) == [(s, i) for s in (0, 2) for i in range(count)]
    assert {(site.num_steps, site.branch, site.backend) for site in seen} == {
        (6, "cond", "reference")
    }
    for site in seen:
        assert float(site.progress) == pytest.approx((site.step + 1) / 6)
        assert list(site.heads) == list(range(site.q.shape[2]))
        assert site.v.shape == site.k.shape and site.softmax_scale == site.q.shape[-1] ** -0.5
