"""The Triton way to choose symbols against its definition in torch: the same bits."""

import dataclasses
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")


from conftest import device_for, random_symbols, when_interpreted
from flashomni import dispatch
from flashomni.kernels.common import portable
from flashomni.policies import AttentionSite, make_policy, policies
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice import op as choice
from flashomni.symbols.choice.op import Rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(bool(portable.available()), reason="; ".join(portable.available())),
]
DEVICE = device_for("portable")


def scalar(value):
    return torch.full((), value, device=DEVICE)


SETTINGS = [
    ("flashomni", {"tau_q": 0.6, "tau_kv": 0.3}),
    ("flashomni", {"tau_q": 0.6, "tau_kv": 0.3, "combine": "mean", "share_heads": True}),
    ("flashomni", {"tau_q": 0.7, "tau_kv": 0.5, "similarity_gate": 0.2, "center_k": True}),
    ("topk", {"q_density": 0.4, "kv_density": 0.3}),
    ("topk", {"q_density": 0.4, "kv_density": 0.3, "share_heads": True}),
    ("spargeattn", {"mass": 0.6, "similarity_gate": 0.2}),
    ("flashomni", {"tau_q": 0.6, "tau_kv": 0.3, "resolution": 8}),
    ("topk", {"kv_density": 0.3, "resolution": 16, "diagonal": True, "text_rows": True}),
    ("spargeattn", {"mass": 0.6, "similarity_gate": 0.2, "resolution": 32}),
]
GRIDS = {
    "text first": Grid(500, 500, (0, 77), block_m=32, block_n=32),
    "text last": Grid(
        500, 500, (400, 500), block_m=32, block_n=32,
        kv_len=torch.tensor([500, 430], dtype=torch.int32),
    ),
    "blocks differ": Grid(700, 700, (0, 130), block_m=32, block_n=64),
}  # fmt: skip


def tokens(grid, heads=4, kv_heads=2, head_dim=16, batch=2, dtype=torch.float32):
    """q and k that drift from block to block, as rows apart in one tensor; padding is NaN."""
    made = []
    for seqlen, count in ((grid.seqlen_q, heads), (grid.seqlen_kv, kv_heads)):
        x = torch.randn(batch, seqlen, count, head_dim, device=DEVICE)
        drift = torch.randn(batch, -(-seqlen // 50), count, head_dim, device=DEVICE)
        x += 1.5 * drift.repeat_interleave(50, 1)[:, :seqlen]
        fused = torch.stack([x, torch.full_like(x, torch.nan)], 2).to(dtype)
        made.append(fused[:, :, 0])
    return made


def both(policy, q, k, grid, t=0.9, **known):
    """What the kernels and the definition choose."""
    return (
        policy(AttentionSite.alone(q, k, grid, scalar(t), backend=backend, **known))
        for backend in ("portable", "reference")
    )


def on_device(grid):
    return grid if grid.kv_len is None else grid.with_kv_len(grid.kv_len.to(DEVICE))


def check_invariants(symbols):
    """Text is computed and visited, no row is empty, padding bits are 0."""
    grid, device = symbols.grid, symbols.q_bits.device
    assert symbols.q_mask()[..., grid.text_q_mask(device)].all()
    assert symbols.kv_mask().any(-1).all()
    assert not (symbols.q_bits & ~grid.all_q_bits(device)).any()
    assert not (symbols.kv_bits & ~grid.all_kv_bits(device)).any()


ODD = {
    "one text token": Grid(1, 1, (0, 1)),
    "one block": Grid(100, 100, (0, 20)),
    "all text": Grid(300, 300, (0, 300)),
    "vision in text blocks only": Grid(200, 200, (0, 100), 64, 256),
    "text last, ragged": Grid(333, 333, (300, 333), 64, 64),
    "text in the middle": Grid(600, 600, spans=(("text", 200, 290),), block_m=32, block_n=64),
    "texts at both ends": Grid(600, 600, (0, 50), 64, 32, spans=(("text", 530, 600),)),
    "few wide blocks": Grid(610, 610, (0, 50), 256, 48),
}


@when_interpreted(pytest.mark.covering(1))
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_policies_choose_the_same(name, settings, grid):
    """Whole policies, both ways, from the same q and k: the same symbols, all invariants kept."""
    grid = on_device(grid)
    q, k = tokens(grid)
    got, expected = both(make_policy(name, **settings), q, k, grid)
    # The means differ in their last bits; these masses have no two prefixes that close.
    assert torch.equal(got.q_bits, expected.q_bits)
    assert torch.equal(got.kv_bits, expected.kv_bits)
    assert 0 < float(got.density()) < 1
    check_invariants(got)
    for start, stop in grid.text_kv_ranges:
        assert got.kv_mask()[..., start:stop].all() or not settings.get("protect_text", True)


@pytest.mark.parametrize("resolution", [0, 16])
def test_scales_choose_the_same(resolution):
    """Of scores, as attention has it."""
    grid = on_device(GRIDS["text last"])
    q, k = tokens(grid)
    policy = make_policy("flashomni", tau_q=0.6, tau_kv=0.3, resolution=resolution)
    got, expected = both(policy, q, k, grid, softmax_scale=0.6)
    usual, _ = both(policy, q, k, grid)
    assert torch.equal(got.q_bits, expected.q_bits)
    assert torch.equal(got.kv_bits, expected.kv_bits)
    assert not torch.equal(got.kv_bits, usual.kv_bits)


def near(rule, q, k, grid):
    """Where the definition may go either way: a threshold 1e-5 larger or smaller decides otherwise.

    bool like ``q_mask`` and ``kv_mask``.
    """
    chosen = [
        choice.choose(
            q, k, grid, replace(rule, tau_q=rule.tau_q * by, tau_kv=rule.tau_kv * by), scalar(1.0),
            backend="reference",
        )
        for by in (1 - 1e-5, 1 + 1e-5)
    ]  # fmt: skip
    return (chosen[0].q_mask() ^ chosen[1].q_mask(), chosen[0].kv_mask() ^ chosen[1].kv_mask())


@when_interpreted(pytest.mark.covering(1))
@pytest.mark.parametrize("compute", ["and", "mean", "c", "g"])
@pytest.mark.parametrize("name", ODD)
def test_odd_sequences_choose_the_same(name, compute):
    """Text anywhere, one block, nothing but text, no vision block: bits differ at the edge only."""
    grid = ODD[name]
    q, k = tokens(grid, dtype=torch.float16)
    rule = Rule("mass", compute, tau_q=0.5, tau_kv=0.4, gate=0.1, text_rows=compute == "mean")
    got = choice.choose(q, k, grid, rule, backend="portable")
    expected = choice.choose(q, k, grid, rule, backend="reference")
    q_edge, kv_edge = near(rule, q, k, grid)
    assert not ((got.q_mask() ^ expected.q_mask()) & ~q_edge).any()
    assert not ((got.kv_mask() ^ expected.kv_mask()) & ~kv_edge).any()
    check_invariants(got)


TEXTLESS = {
    "one token": Grid(1, 1),
    "alike": Grid(500, 500, block_m=32, block_n=32),
    "padded": Grid(500, 500, block_m=32, block_n=32, kv_len=torch.tensor([500, 300]).int()),
    "blocks differ": Grid(610, 610, block_m=64, block_n=48),
    "sequences differ": Grid(300, 520, block_m=32, block_n=32),
}


@when_interpreted(pytest.mark.covering(1))
@pytest.mark.parametrize("compute", ["and", "mean", "c", "g"])
@pytest.mark.parametrize("name", TEXTLESS)
def test_sequences_without_text_choose_the_same(name, compute):
    """C of all rows; G of a guide, and without one the rules that need G are refused."""
    grid = on_device(TEXTLESS[name])
    q, k = tokens(grid)
    guide = torch.rand(2, 4, grid.num_q_blocks, 7, device=DEVICE).mul(9).softmax(-1)
    for given in (guide, None):
        rule = Rule("mass", compute, tau_q=0.5, tau_kv=0.4, share_heads=given is None)
        if given is None and compute != "c":
            with pytest.raises(ValueError, match=f"compute {compute} needs text tokens or a guide"):
                choice.choose(q, k, grid, rule, backend="portable")
            continue
        got, expected = (
            choice.choose(q, k, grid, rule, guide=given, backend=backend)
            for backend in ("portable", "reference")
        )
        assert torch.equal(got.q_bits, expected.q_bits)
        assert torch.equal(got.kv_bits, expected.kv_bits)
        check_invariants(got)


def test_rules_without_text_columns_and_without_choice():
    """Text may be skipped where the rule says so; `all` leaves nothing out; both may be mixed."""
    grid = Grid(300, 300, (0, 40), 32, 32)
    q, k = tokens(grid)
    for rule in (
        Rule("mass", "all", tau_kv=0.7, text_columns=False),
        Rule("count", "and", tau_q=0.6, count_kv=3, share_heads=True),
        Rule("all", "count", count_q=4),
        Rule("all", "g", tau_q=0.6, power=1.7),
        Rule(),
    ):
        options = (q, k, grid, rule, scalar(0.8))
        got = choice.choose(*options, backend="portable")
        expected = choice.choose(*options, backend="reference")
        assert torch.equal(got.q_bits, expected.q_bits)
        assert torch.equal(got.kv_bits, expected.kv_bits)
        check_invariants(got)


def test_rules_are_checked():
    """What a rule may say, and what it needs."""
    grid = Grid(64, 64, block_m=16, block_n=16)
    x = torch.zeros(1, 64, 1, 16)
    with pytest.raises(ValueError, match="visit must be one of all, mass, count, got 'some'"):
        Rule(visit="some")
    with pytest.raises(
        ValueError, match="compute g needs text tokens or a guide, got a grid of 64"
    ):
        choice.choose(x, x, grid, Rule(compute="g"))
    with pytest.raises(ValueError, match="progress must be given"):
        choice.choose(x, x, grid, Rule(power=2.0))
    long = Grid(300_000, 300_000, block_m=16, block_n=16)
    reasons = dispatch.find("choose", "portable").refuses(
        choice.ChooseCall(x, x, long, Rule(), None)
    )
    assert any("at most 16384 blocks, got 18750" in reason for reason in reasons)


def test_long_rows():
    """More blocks than a warp holds: 1,100 of 16 tokens, a row of 2,048 columns."""
    grid = Grid(17_590, 17_590, (17_500, 17_590), block_m=256, block_n=16)
    q, k = tokens(grid, heads=1, kv_heads=1, batch=1)
    rule = Rule("mass", "and", tau_q=0.5, tau_kv=0.3)
    got = choice.choose(q, k, grid, rule, backend="portable")
    expected = choice.choose(q, k, grid, rule, backend="reference")
    q_edge, kv_edge = near(rule, q, k, grid)
    assert not ((got.q_mask() ^ expected.q_mask()) & ~q_edge).any()
    assert not ((got.kv_mask() ^ expected.kv_mask()) & ~kv_edge).any()
    assert kv_edge.float().mean() < 0.01 < float(got.kv_density()) < 0.9


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("blocks", [(5, 33), (70, 31), (9, 64), (1, 1)], ids=str)
def test_measure_counts(blocks, shared):
    """Densities, filled rows and shares of streams are those of the masks."""
    grid = Grid(blocks[0] * 32 - 7, blocks[1] * 16 - 3, block_m=32, block_n=16)
    symbols = random_symbols(grid, *((1, 1) if shared else (2, 3)), 0.5, 0.8).expand(2, 3)
    symbols = symbols.to(DEVICE)
    for min_skip in (0.0, 0.2, 1.0):
        expected = symbols.fill_rows(min_skip)
        got, q_density, kv_density = choice.measure(symbols, min_skip, backend="portable")
        assert torch.equal(got.kv_bits, expected.kv_bits)
        torch.testing.assert_close(q_density, expected.q_density())
        torch.testing.assert_close(kv_density, expected.kv_density())
    none = Symbols(torch.zeros_like(symbols.q_bits), symbols.kv_bits, grid)
    assert [float(x) for x in choice.measure(none, backend="portable")[1:]] == [0.0, 0.0]
    for offset, rows in ((0, grid.seqlen_q), (0, 20), (grid.seqlen_q // 3, grid.seqlen_q // 2)):
        got, expected = (
            choice.live_share(symbols, rows, offset, backend=b) for b in ("portable", "reference")
        )
        torch.testing.assert_close(got, expected)


def test_a_gpu_uses_the_kernels():
    """And a CPU never does: there they would run in the interpreter."""
    grid = Grid(64, 64, block_m=16, block_n=16)
    calls = {
        "choose": lambda x: choice.ChooseCall(x, x, grid, Rule(), None),
        "live_share": lambda x: choice.LiveCall(x[0, :, :, 0].to(torch.uint8), 4, 16, 64, 0),
    }
    x = torch.zeros(1, 64, 1, 16)
    for op, make in calls.items():
        assert dispatch.select(op, make(x)).name == "cpu"
        if torch.cuda.is_available():
            for asked, expected in (
                (None, "portable"),
                ("sm90", "portable"),
                *[("reference",) * 2],
            ):
                assert dispatch.select(op, make(x.cuda()), asked).name == expected


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(policies()))
def test_policies_replay_in_a_cuda_graph_and_compile(name):
    """No decision on the host: other q and k, same graph; one graph for torch.compile as well."""
    grid, progress = GRIDS["text first"], scalar(0.9)
    q, k = torch.randn(2, 2, 500, 4, 16, device=DEVICE)
    takes_frames = "frames" in {field.name for field in dataclasses.fields(policies()[name])}
    settings = {"frames": 16} if takes_frames else {}  # this grid has no shape
    policy = make_policy(name, **settings)

    def run(q, k):
        symbols = policy(AttentionSite.alone(q, k, grid, progress))
        return symbols.q_bits, symbols.kv_bits

    run(q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k)
    q.normal_()
    k.normal_()
    expected = run(q, k)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(q, k), expected, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "most"), [("flashomni", 3), ("topk", 3), ("spargeattn", 2)], ids=str
)
def test_launches(name, most, monkeypatch):
    """Few: pool, visit, cache; one more for densities and filled rows; one for a stream's share."""
    from torch.profiler import ProfilerActivity, profile

    # The poison of the tests is a launch for each torch.empty.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    grid, policy = GRIDS["text first"], make_policy(name)
    q, k = torch.randn(2, 2, 500, 4, 16, device=DEVICE)

    def choose():
        symbols = policy(AttentionSite.alone(q, k, grid, progress))
        symbols, *_ = choice.measure(symbols, 0.1)
        return choice.live_share(symbols, 300, 77)

    progress = scalar(0.9)
    choose()  # compiles, and makes the constants of the grid
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        choose()
        torch.cuda.synchronize()
    events = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(events) <= most + 2, events
