"""torch's attention as a backend: taken where a table says so, or where it is named."""

import json

import pytest
import torch

import flashomni
from conftest import random_symbols
from flashomni import dispatch
from flashomni.kernels import ForecastTerms, sparse_attention
from flashomni.kernels.attention import _measured, sdpa
from flashomni.kernels.attention.op import AttentionCall
from flashomni.lab.ops import dense
from flashomni.symbols import Grid

FAST, SLOW = {"ours_ms": 2.0, "sdpa_ms": 1.5}, {"ours_ms": 1.0, "sdpa_ms": 0.99}
BF16 = torch.bfloat16


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, on a card that nobody has."""
    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Nothing 1")
    monkeypatch.setattr(_measured, "places", lambda device: ("nvidia-nothing-1", "default"))
    monkeypatch.setattr(_measured, "read", lambda name: {})
    _measured.entries.cache_clear()
    yield tmp_path / "kernels" / "nvidia-nothing-1.json"
    _measured.entries.cache_clear()


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend registered anew, for tensors on the CPU; everything else as it is."""
    for name, kept in (("_registry", dict(dispatch._registry)), ("_sorted", {}), ("_usable", {})):
        monkeypatch.setattr(dispatch, name, kept)
    dispatch.registered("attention")
    del dispatch._registry["attention", "sdpa"]
    dispatch.register(
        "attention", "sdpa", rank=50, refuses=sdpa.refuse_features, prefers=sdpa._prefers
    )(sdpa.run)
    yield
    dispatch.forget_choices()


def call_of(seqlen_q, seqlen_kv, head_dim=32, dtype=torch.float32, heads=4, kv_heads=2):
    q = torch.randn(2, seqlen_q, heads, head_dim, dtype=dtype)
    k, v = torch.randn(2, 2, seqlen_kv, kv_heads, head_dim, dtype=dtype)
    return AttentionCall(q, k, v, torch.full_like(q, 7.0), None, None, None, head_dim**-0.5)


def told(cache, table, **versions):
    cache.parent.mkdir(parents=True, exist_ok=True)
    made = _measured.made_with() | versions
    cache.write_text(json.dumps({"made with": made, _measured.TABLE: table}))
    _measured.entries.cache_clear()


def test_it_is_dense_attention():
    """Heads of keys fewer than of queries, lengths that differ, a scale: the definition."""
    call = call_of(70, 130)
    sdpa.run(call)
    exact = sparse_attention(call.q, call.k, call.v, backend="reference")
    torch.testing.assert_close(call.out, exact, atol=1e-5, rtol=1e-4)


def test_the_table_chooses(cache, on_cpu):
    """By dtype, head_dim and the power of two of the length; what is not measured is not faster."""
    call = call_of(1030, 2000)
    assert dispatch.select("attention", call).name != "sdpa"
    told(cache, {_measured.key(torch.float32, 32, 1500): FAST})
    assert dispatch.select("attention", call).name == "sdpa"
    for other in (
        call_of(1030, 2048),  # the next power of two
        call_of(200, 2000),  # a cross-attention
        call_of(1030, 2000, head_dim=64),
        call_of(1030, 2000, dtype=BF16),
    ):
        assert dispatch.select("attention", other).name != "sdpa"
    told(cache, {_measured.key(torch.float32, 32, 1500): SLOW})
    assert dispatch.select("attention", call).name != "sdpa"


def test_named_it_runs_whatever_the_table_says(cache, on_cpu):
    """And never falls back: what it cannot do is a refusal with every reason."""
    q, k, v = torch.randn(3, 1, 200, 2, 32)
    got = sparse_attention(q, k, v, backend="sdpa")
    torch.testing.assert_close(got, sparse_attention(q, k, v, backend="reference"))
    symbols = random_symbols(Grid(200, 200), 1, 2)
    kv_len = torch.tensor([100], dtype=torch.int32)
    lse = torch.zeros(1, 2, 200)
    forecast = ForecastTerms([torch.zeros(1, 200, 2, 32)], torch.ones(1))
    with pytest.raises(NotImplementedError) as refusal:
        sparse_attention(
            q, k, v, symbols, kv_len=kv_len, lse=lse, forecast=forecast, backend="sdpa"
        )
    for name in ("symbols", "kv_len", "lse", "forecast"):
        assert f"{name} must be None" in str(refusal.value)


def test_calls_that_need_more_go_to_another(cache, on_cpu):
    """Faster or not: with symbols or an lse it is not asked."""
    told(cache, {_measured.key(torch.float32, 32, 1024): FAST})
    q, k, v = torch.randn(3, 1, 1024, 2, 32)
    plain = AttentionCall(q, k, v, torch.empty_like(q), None, None, None, 0.2)
    assert dispatch.select("attention", plain).name == "sdpa"
    symbols = random_symbols(Grid(1024, 1024), 1, 2)
    sparse = AttentionCall(q, k, v, torch.empty_like(q), None, symbols, None, 0.2)
    with_lse = AttentionCall(q, k, v, torch.empty_like(q), torch.zeros(1, 2, 1024), None, None, 0.2)
    assert dispatch.select("attention", sparse).name == "cpu"
    assert dispatch.select("attention", with_lse).name == "cpu"


def test_tensors_elsewhere_are_refused():
    """The backend as it is registered is for GPUs."""
    why = sdpa._refuses(call_of(20, 20))
    assert why == ["tensors are on cpu, this backend is for GPUs"]


def test_versions_need_no_installed_package(monkeypatch):
    """Also those of a source tree on the path are known."""

    def version(name):
        raise _measured.PackageNotFoundError(name)

    monkeypatch.setattr(_measured, "version", version)
    made = _measured.made_with()
    assert made["flashomni"] == flashomni.__version__ and made["triton"] == "none"


def test_rows_are_remembered_until_something_changes(cache):
    """One file a card; other versions of torch, Triton or the driver make it void, damage too."""
    name = "NVIDIA Nothing 1"
    dense.remember(name, BF16, dense.DenseRow("bfloat16", 128, 4608, "portable", 2.0, 1.0))
    dense.remember(name, BF16, dense.DenseRow("bfloat16", 64, 4608, "portable", 1.0, 2.0))
    device = torch.device("cuda", 0)
    faster = lambda dim: _measured.sdpa_is_faster(device, BF16, dim, 4608, 5000)  # noqa: E731
    assert faster(128) and not faster(64) and not faster(96)
    table = json.loads(cache.read_text())[_measured.TABLE]
    told(cache, table)
    assert faster(128)
    told(cache, table, torch="0.1")
    assert not faster(128)
    dense.remember(name, BF16, dense.DenseRow("bfloat16", 64, 4608, "portable", 2.0, 1.0))
    assert faster(64) and not faster(128)  # the void rows went
    for damaged in ("{", "[]", json.dumps({"made with": _measured.made_with()})):
        cache.write_text(damaged)
        _measured.entries.cache_clear()
        assert not faster(64)


def test_shipped_rows_count_until_the_user_has_measured(cache, monkeypatch):
    """A card's configuration may have them; the user's own come first."""
    shipped = {_measured.TABLE: {_measured.key(BF16, 128, 4608): FAST}}
    monkeypatch.setattr(_measured, "read", lambda name: shipped)
    device = torch.device("cuda", 0)
    assert _measured.sdpa_is_faster(device, BF16, 128, 4608, 4608)
    told(cache, {_measured.key(BF16, 128, 4608): SLOW})
    assert not _measured.sdpa_is_faster(device, BF16, 128, 4608, 4608)


def test_measuring_needs_a_gpu():
    """On a CPU there is nothing to choose from."""
    with pytest.raises(NotImplementedError, match="only a CUDA device"):
        next(dense.measure_dense(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path, monkeypatch):
    """Measured once, then chosen by that; named it is captured in a graph, into a strided out."""
    monkeypatch.setenv("FLASHOMNI_CACHE", str(tmp_path))
    _measured.entries.cache_clear()
    device = torch.device("cuda", 0)
    rows = list(dense.measure_dense(device, [BF16], [64], [1024]))
    assert [(row.head_dim, row.seqlen) for row in rows] == [(64, 1024)]
    q, k, v = torch.randn(3, 1, 1500, 4, 64, device=device).to(BF16)
    call = AttentionCall(q, k, v, torch.empty_like(q), None, None, None, 0.125)
    times = {"ours_ms": rows[0].ours_ms, "sdpa_ms": rows[0].sdpa_ms}
    chosen = dispatch.select("attention", call).name
    assert chosen == ("sdpa" if _measured.is_faster(times) else rows[0].backend)
    wide = torch.full((1, 1500, 6, 64), 7.0, device=device, dtype=BF16)
    out = wide[:, :, 1:5]
    sparse_attention(q, k, v, out=out, backend="sdpa")
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_attention(q, k, v, out=out, backend="sdpa")
    out.zero_()
    graph.replay()
    assert torch.equal(out, first) and (wide[:, :, (0, 5)] == 7).all()
    exact = sparse_attention(q.float(), k.float(), v.float(), backend="reference")
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    _measured.entries.cache_clear()
