"""The Triton way to choose symbols against its definition in torch: the same bits."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from conftest import device_for
from flashomni import dispatch
from flashomni.kernels.common import portable
from flashomni.policies import AttentionSite, make_policy, policies
from flashomni.symbols import Grid, pack_bits, row_bytes, unpack_bits
from flashomni.symbols.choice import op as choice
from flashomni.symbols.choice import portable as kernels
from flashomni.symbols.choice.op import heaviest, low_mass, pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(bool(portable.available()), reason="; ".join(portable.available())),
]
DEVICE = device_for("portable")
TAUS = [0.0, 1e-6, 0.05, 0.5, 0.95, 1.0]


def scalar(value):
    return torch.full((), value, device=DEVICE)


def masses(kind, rows, columns):
    """Rows that are not negative: spread out, peaked, full of ties, with zeros, or huge."""
    normal = torch.randn(rows, columns, device=DEVICE)
    return {
        "flat": lambda: (0.1 * normal).softmax(-1),
        "peaked": lambda: (8 * normal).softmax(-1),  # down to denormals and below
        "ties": lambda: normal.abs().mul(2).round() / 16,
        "equal": lambda: torch.full_like(normal, 0.25),
        "zeros": lambda: normal.relu() * (normal < 1),
        "huge": lambda: (normal * 10).exp(),
        "no mass": lambda: torch.zeros_like(normal),
    }[kind]()


KINDS = ["flat", "peaked", "ties", "equal", "zeros", "huge", "no mass"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 33, 130])
def test_heavy(kind, columns):
    """Bit for bit the definition, ties and padding bits included."""
    mass = masses(kind, 3, columns)
    for tau in TAUS:
        expected = pack_bits(~low_mass(mass, tau), row_bytes(columns))
        assert torch.equal(kernels.heavy(mass, scalar(tau), row_bytes(columns)), expected), tau


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 33, 130])
def test_most(kind, columns):
    """Bit for bit the definition; exactly so many bits; the heaviest, the first among equals."""
    mass = masses(kind, 3, columns)
    for count in {0, 1, columns // 2, columns}:
        got = kernels.most(mass, count, -(-columns // 8))
        assert torch.equal(got, pack_bits(heaviest(mass, count), -(-columns // 8)))
        assert (unpack_bits(got, 8 * got.shape[-1]).sum(-1) == count).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_as_much_as_may_be(kind):
    """At most tau of the mass, and one entry more would be too much (in exact arithmetic)."""
    mass = masses(kind, 4, 65)
    for tau in TAUS:
        kept = unpack_bits(kernels.heavy(mass, scalar(tau), 12), 65)
        for row, keep in zip(mass.double(), kept, strict=True):
            left_out, limit = row[~keep].sum(), scalar(tau).double() * row.sum()
            slack = 1e-12 * row.sum()
            assert left_out <= limit + slack
            if keep.any():
                assert left_out + row[keep].min() > limit - slack
                assert (~keep).sum() == 0 or row[~keep].max() <= row[keep].min()


def test_infinite_mass_wins():
    """`topk` gives text infinite mass: it is taken first, and counts."""
    mass = torch.tensor([[0.5, torch.inf, 0.1, torch.inf, 0.9]], device=DEVICE)
    for count, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        got = unpack_bits(kernels.most(mass, count, 1), 5)[0]
        assert got.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 48, 128, 256])
def test_block_means(dtype, block):
    """The definition is `pool`: ragged ends, valid lengths, strides, padding of NaN."""
    fused = torch.randn(2, 300, 3, 2, 24, device=DEVICE, dtype=dtype)
    x, lengths = fused[:, :, 1], torch.tensor([300, 70], dtype=torch.int32, device=DEVICE)
    for length in (None, lengths):
        got = kernels.block_means(x, block, length, unit=False)
        torch.testing.assert_close(got, pool(x, block, length), atol=1e-6, rtol=1e-5)
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        got = kernels.block_means(x, block, length, unit=True)
        torch.testing.assert_close(got, pool(unit, block, length), atol=1e-6, rtol=1e-5)
    clean = kernels.block_means(x, block, lengths, unit=False)
    x[1, 70:] = float("nan")
    assert torch.equal(kernels.block_means(x, block, lengths, unit=False), clean)


SETTINGS = [
    ("flashomni", {"tau_q": 0.6, "tau_kv": 0.3}),
    ("flashomni", {"tau_q": 0.6, "tau_kv": 0.3, "combine": "mean", "share_heads": True}),
    ("flashomni", {"tau_q": 0.7, "tau_kv": 0.5, "similarity_gate": 0.2, "center_k": True}),
    ("topk", {"q_density": 0.4, "kv_density": 0.3}),
    ("topk", {"q_density": 0.4, "kv_density": 0.3, "share_heads": True}),
    ("spargeattn", {"mass": 0.6, "similarity_gate": 0.2}),
]
GRIDS = {
    "text first": Grid(500, 500, (0, 77), block_m=32, block_n=32),
    "text last": Grid(
        500, 500, (400, 500), block_m=32, block_n=32,
        kv_len=torch.tensor([500, 430], dtype=torch.int32),
    ),
    "blocks differ": Grid(700, 700, (0, 130), block_m=32, block_n=64),
}  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_policies_choose_the_same(name, settings, grid, monkeypatch):
    """Whole policies, both ways, from the same q and k: the same symbols, all invariants kept."""
    q = torch.randn(2, grid.seqlen_q, 4, 16, device=DEVICE)
    k = torch.randn(2, grid.seqlen_kv, 2, 16, device=DEVICE)
    for x in (q, k):
        drift = torch.randn(2, -(-x.shape[1] // 50), x.shape[2], 16, device=DEVICE)
        x += 1.5 * drift.repeat_interleave(50, 1)[:, : x.shape[1]]
    if grid.kv_len is not None:
        grid = grid.with_kv_len(grid.kv_len.to(DEVICE))
    policy, progress = make_policy(name, **settings), scalar(0.9)
    monkeypatch.setattr(
        choice, "execute", lambda op, call, _: dispatch.execute(op, call, "portable")
    )
    got = policy(AttentionSite.alone(q, k, grid, progress))
    monkeypatch.setattr(
        choice, "execute", lambda op, call, _: dispatch.execute(op, call, "reference")
    )
    expected = policy(AttentionSite.alone(q, k, grid, progress))
    # The means differ in their last bits; these masses have no two prefixes that close.
    assert torch.equal(got.q_bits, expected.q_bits)
    assert torch.equal(got.kv_bits, expected.kv_bits)
    assert 0 < float(got.density()) < 1
    assert got.q_mask()[..., grid.text_q_mask(q.device)].all()
    for start, stop in grid.text_kv_ranges:
        assert got.kv_mask()[..., start:stop].all()


def test_a_gpu_uses_the_kernels():
    """And a CPU never does: there they would run in the interpreter."""
    mass = torch.zeros(1, 16)
    assert dispatch.select("heaviest_bits", choice.HeaviestCall(mass, 1, 2)).name == "cpu"
    if torch.cuda.is_available():
        call = choice.HeaviestCall(mass.cuda(), 1, 2)
        assert dispatch.select("heaviest_bits", call).name == "portable"
        assert dispatch.select("heaviest_bits", call, "sm90").name == "portable"
        assert dispatch.select("heaviest_bits", call, "reference").name == "reference"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(policies()))
def test_policies_replay_in_a_cuda_graph_and_compile(name):
    """No decision on the host: other q and k, same graph; one graph for torch.compile as well."""
    grid, progress = GRIDS["text first"], scalar(0.9)
    q, k = torch.randn(2, 2, 500, 4, 16, device=DEVICE)
    settings = {"frames": 16} if name == "radial" else {}  # this grid has no shape
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
