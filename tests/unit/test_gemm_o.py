"""GEMM-O: cached + live = dense, whatever the mask, and forecasts commute with the projection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import device_for, examples, gemm_takes, random_symbols, with_gpu_marks
from flashomni import dispatch
from flashomni.engine import forecasts
from flashomni.engine.forecasts import difference_weights
from flashomni.engine.state.cache import History
from flashomni.engine.state.storage import Storage
from flashomni.kernels import backends, gemm_o_update, sparse_gemm_o
from flashomni.kernels.gemm_o.op import GemmOCall, GemmOUpdateCall
from flashomni.symbols import Grid, Symbols

BACKENDS = with_gpu_marks(backends("gemm_o"))
OFFSET = 77


class Layer:
    """A projection with K != N and an always-on range, and the stream it projects.

    Sizes that the backend does not take are rounded up to what it takes.
    """

    def __init__(
        self, backend, batch=2, rows=200, heads=3, head_dim=None, features=50, extra=20, dtype=None
    ):
        takes = gemm_takes(backend)
        features, extra = (-(-n // takes.multiple) * takes.multiple for n in (features, extra))
        head_dim = takes.head_dims[0] if head_dim is None else head_dim
        self.backend, self.device = backend, device_for(backend)
        self.dtype = takes.dtypes[0] if dtype is None else dtype
        self.shape = (batch, rows, heads, head_dim)
        self.grid = Grid(OFFSET + rows, OFFSET + rows, block_m=takes.block_m[0])
        self.weight = self.randn(features, heads * head_dim + extra) / (heads * head_dim) ** 0.5
        self.bias, self.width = self.randn(features), heads * head_dim
        self.always = self.randn(batch, rows, extra) if extra else None

    def randn(self, *shape):
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def symbols(self, density=0.5):
        return random_symbols(self.grid, self.shape[0], self.shape[2], density).to(self.device)

    def live(self, symbols):
        """bool ``[B, R, H, 1]``"""
        per_token = symbols.q_mask().repeat_interleave(self.grid.block_m, -1)
        return per_token[..., OFFSET : OFFSET + self.shape[1]].mT[..., None]

    def options(self):
        return {"always": self.always, "row_offset": OFFSET, "backend": self.backend}

    def update(self, history, symbols):
        return gemm_o_update(history, self.weight, self.bias, symbols, **self.options())

    def dispatch(self, o, symbols, terms=None, coefficients=None, out=None):
        weights = (self.weight, self.bias, symbols, terms, coefficients)
        return sparse_gemm_o(o, *weights, out=out, **self.options())

    def dense(self, o):
        """The whole projection in fp64."""
        x = o.flatten(2) if self.always is None else torch.cat([o.flatten(2), self.always], -1)
        y = torch.nn.functional.linear(x.double(), self.weight.double(), self.bias.double())
        return y.float()

    def poisoned(self, o, symbols):
        """o with NaN in the cached tiles: nobody may read them."""
        return o.masked_fill(~self.live(symbols), float("nan"))


def close(a, b):
    """Equal but for rounding; bias terms and result of a 16 bit backend are each rounded once."""
    tolerance = {"atol": 5e-5, "rtol": 1e-4}
    if a.dtype != torch.float32:
        tolerance = {"atol": 2e-2, "rtol": 4e-3}
    torch.testing.assert_close(a.float(), b.float(), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@examples(30)
@given(data=st.data())
def test_cached_plus_live_is_dense(backend, data):
    """At x = 0 the Dispatch result is the dense one, for any mask, shape, order, K != N."""
    sizes = {
        "batch": data.draw(st.integers(1, 3)),
        "rows": data.draw(st.integers(1, 200)),
        "heads": data.draw(st.integers(1, 9)),
        "head_dim": data.draw(st.sampled_from(gemm_takes(backend).head_dims)),
        "features": data.draw(st.integers(1, 70)),
        "extra": data.draw(st.sampled_from([0, 24])),
    }
    layer, order = Layer(backend, **sizes), data.draw(st.integers(0, 2))
    symbols = layer.symbols(data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    history = [layer.randn(*layer.shape) for _ in range(order + 1)]
    y, terms = layer.update(history, symbols)
    close(y, layer.dense(history[0]))
    at_zero = torch.tensor([1.0] + [0.0] * order, device=layer.device)
    out = torch.full_like(y, float("nan"))  # every element must be written
    got = layer.dispatch(layer.poisoned(history[0], symbols), symbols, terms, at_zero, out)
    assert got is out
    close(got, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", sorted(set(forecasts()) - {"fitted"}))  # it has none of its own
@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_commutes_with_projection_after_the_mask_changed(backend, basis, order):
    """Three Updates under three masks; then y = project(live O, forecast of the cached O)."""
    layer, step = Layer(backend), 0
    history = History(order, order, Storage())
    for step, o in ((0, 1.0), (3, 2.0), (8, 4.0)):
        symbols = layer.symbols()
        terms_of_o = history.push(layer.randn(*layer.shape) * o, step)
        _, terms = layer.update(terms_of_o, symbols)
    weights = torch.tensor(difference_weights(basis, history.times, 10), device=layer.device)
    now = layer.randn(*layer.shape)
    forecast = sum(w * f.float() for w, f in zip(weights, terms_of_o, strict=True))
    expected = layer.dense(torch.where(layer.live(symbols), now.float(), forecast))
    close(layer.dispatch(layer.poisoned(now, symbols), symbols, terms, weights), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_differences_of_bias_terms_are_wrong_where_the_mask_changed(backend):
    """The trap: B(k) - B(k-1) is the projected difference only where the mask stayed."""
    layer = Layer(backend, rows=1500, heads=2)  # enough blocks to have both kinds
    old, new = layer.randn(*layer.shape), layer.randn(*layer.shape)
    first, second = layer.symbols(), layer.symbols()
    _, before = layer.update([old], first)
    _, right = layer.update([new, new - old], second)
    wrong = right[0] - before[0]
    same = (layer.live(first) == layer.live(second)).all(2)[..., 0]  # [B, R]
    assert same.any() and not same.all()
    close(wrong[same], right[1][same])
    assert (wrong - right[1])[~same].abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_torch(backend, dtype):
    """Error at most twice that of F.linear in the same dtype."""
    if dtype not in gemm_takes(backend).dtypes:
        pytest.skip(f"{backend} takes no {dtype} here")
    layer = Layer(backend, extra=0, dtype=dtype)
    o, symbols = layer.randn(*layer.shape), Symbols.dense(layer.grid, 2, 3)
    exact = layer.dense(o)
    plain = torch.nn.functional.linear(o.flatten(2), layer.weight, layer.bias).float()
    got = layer.dispatch(o, symbols.to(layer.device)).float()
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    """o is a run of a longer sequence, the weight a slice of a wider matrix, no bias."""
    layer = Layer(backend, extra=0)
    head_dim, width = layer.shape[-1], layer.width
    whole = layer.randn(2, 300, 3, head_dim)
    layer.weight = layer.randn(72, width + 56)[8:64, :width] / width**0.5
    layer.bias = None
    symbols = layer.symbols()
    y, terms = layer.update([whole[:, 100:]], symbols)
    expected = torch.nn.functional.linear(whole[:, 100:].flatten(2), layer.weight)
    close(y, expected)
    one = torch.ones(1, device=layer.device)
    close(layer.dispatch(whole[:, 100:], symbols, terms, one), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_in_a_cuda_graph_with_other_symbols(backend):
    """Nothing of a call is decided on the host: new bits and coefficients, same graph."""
    if device_for(backend).type != "cuda":
        pytest.skip(f"{backend} does not run on CUDA here")
    layer = Layer(backend)
    history, symbols = [layer.randn(*layer.shape) for _ in range(2)], layer.symbols()
    weights = torch.tensor([1.0, 0.5], device=layer.device)

    def step():
        y, terms = layer.update(history, symbols)
        return y, layer.dispatch(history[1], symbols, terms, weights)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        symbols.q_bits.copy_(layer.symbols().q_bits)
        weights.mul_(0.5)
        expected = step()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("features", [3080, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_calls(backend, features, density):
    """Many rounds of tiles, which sm90 groups by features, the last group narrower."""
    if device_for(backend).type != "cuda":
        pytest.skip(f"{backend} does not run on CUDA here")
    layer = Layer(backend, batch=1, rows=9001, heads=9, head_dim=128, features=features)
    symbols = layer.symbols(density)
    history = [layer.randn(*layer.shape) for _ in range(3)]
    y, terms = layer.update(history, symbols)
    close(y, layer.dense(history[0]))
    at_zero = torch.tensor([1.0, 0.0, 0.0], device=layer.device)
    results = []
    for _ in range(2):
        out = torch.full_like(y, float("nan"))
        layer.dispatch(layer.poisoned(history[0], symbols), symbols, terms, at_zero, out)
        results.append(out)
    close(results[0], y)
    assert torch.equal(*results)


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_passes_opcheck():
    """Both ops: one opaque node each; schema, fake and functionalisation are right."""
    layer = Layer("cpu")
    symbols, history = layer.symbols(), [layer.randn(*layer.shape) for _ in range(2)]
    weights = torch.tensor([1.0, 0.5])

    def run(o, difference):
        y, terms = layer.update([o * 2, difference], symbols)
        return y + layer.dispatch(o, symbols, terms, weights)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*history), run(*history))
    y, terms = layer.update(history, symbols)
    shared = (layer.weight, layer.bias, layer.always)
    call = GemmOCall(history[0], *shared, terms, weights, y, symbols, OFFSET)
    arguments = dispatch.arguments("gemm_o", call)
    torch.library.opcheck(torch.ops.flashomni.gemm_o.default, arguments)
    call = GemmOUpdateCall(history, *shared, y, terms, symbols, OFFSET)
    arguments = dispatch.arguments("gemm_o_update", call)
    torch.library.opcheck(torch.ops.flashomni.gemm_o_update.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o": torch.zeros(1, 90, 2, 16).double()}, "o must be float32 or float16 or bfloat16"),
        ({"o": torch.zeros(1, 90, 3, 16)}, r"o must be \[B, R, 2, D\]"),
        ({"weight": torch.zeros(24, 33)}, r"weight must be \[N, 2 \* 16 \+ 0\]"),
        ({"always": torch.zeros(1, 90, 5)}, r"weight must be \[N, 2 \* 16 \+ 5\]"),
        ({"bias": torch.zeros(23)}, r"bias must be \[24\]"),
        ({"row_offset": 11}, "do not fit in the 100 query tokens"),
        ({"bias_terms": torch.zeros(1, 1, 90, 24)}, "bias_terms and coefficients belong together"),
        (
            {"bias_terms": torch.zeros(2, 1, 90, 24), "coefficients": torch.ones(1)},
            r"bias_terms must be \[1, 1, 90, 24\]",
        ),
        (
            {"bias_terms": torch.zeros(1, 1, 90, 24), "coefficients": torch.ones(1).half()},
            "coefficients must be float32",
        ),
        ({"out": torch.zeros(1, 90, 25)}, r"out must be \[1, 90, 24\]"),
        ({"backend": "abacus"}, "backend must be one of .*reference"),
    ],
)
def test_refusals_name_the_argument(change, message):
    """What was given and what is allowed."""
    call = {
        "o": torch.zeros(1, 90, 2, 16),
        "weight": torch.zeros(24, 32),
        "bias": None,
        "symbols": Symbols.dense(Grid(100, 100), 1, 2),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sparse_gemm_o(**call)


def test_update_refuses():
    """No terms, and terms of another shape."""
    o, weight, symbols = (
        torch.zeros(1, 90, 2, 16),
        torch.zeros(24, 32),
        Symbols.dense(Grid(90, 90), 1, 2),
    )
    with pytest.raises(ValueError, match="terms must hold at least one tensor"):
        gemm_o_update([], weight, None, symbols)
    with pytest.raises(ValueError, match=r"terms\[1\] must be \[1, 90, 2, 16\]"):
        gemm_o_update([o, o[:, :80]], weight, None, symbols)
    with pytest.raises(ValueError, match=r"bias_terms must be \[1, 1, 90, 24\]"):
        gemm_o_update([o], weight, None, symbols, bias_terms=torch.zeros(2, 1, 90, 24))
