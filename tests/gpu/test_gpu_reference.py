"""``backend="reference"`` is the definition on a GPU too: the profiler sees none of our kernels."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import flashomni
from conftest import generation, random_symbols
from flashomni.kernels import gemm_o_update, sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.elementwise import op as elementwise
from flashomni.lab.e2e.parts import ours
from flashomni.models import adapters
from flashomni.symbols import Grid
from flashomni.symbols.choice import op as choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def launched(run):
    """Names of our kernels that ran, and how many kernels ran at all."""
    run()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    return {name for name in names if name in ours()}, len(names)


def every_op(backend):
    """One call of each op, as a step makes them."""
    rows, heads, head_dim, width = 330, 2, 64, 128
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x, y = torch.randn(2, 1, rows, width, **kind)
    gate, scale, shift = torch.randn(3, 1, width, **kind)
    q, k, v = torch.randn(3, 1, rows, heads, head_dim, **kind)
    weight = torch.randn(width, width, **kind) / width**0.5
    symbols = random_symbols(Grid(rows, rows), 1, heads, 0.6, 0.5).to("cuda")
    coefficients = torch.ones(2, device="cuda")
    grid, rule = Grid(rows, rows, (0, 30)), choice.Rule(visit="mass", compute="and", tau_kv=0.3)
    norm = torch.ones(head_dim, **kind)
    passes = elementwise

    def run():
        sparse_gemm_q(x, weight, None, symbols, backend=backend)
        sparse_attention(q, k, v, symbols, backend=backend)
        _, terms = gemm_o_update([q, k], weight, None, symbols, backend=backend)
        sparse_gemm_o(v, weight, None, symbols, terms, coefficients, backend=backend)
        passes.modulated_norm(x, scale, shift, 1e-6, backend=backend)
        passes.gated_residual(x, y, gate, backend=backend)
        passes.gated_residual_norm(x, y, gate, scale, shift, 1e-6, backend=backend)
        passes.norm_rope_(q.clone(), norm, 1e-6, None, backend=backend)
        passes.differences(x, y, [y], [2.0], backend=backend)
        passes.weighted_sum([x, y], coefficients, x, x.dtype, backend=backend)
        chosen = choice.choose(q, k, grid, rule, backend=backend)
        choice.measure(chosen, 0.1, backend=backend)
        choice.live_share(chosen, 100, 10, backend=backend)

    return run


def test_no_op_of_reference_launches_a_kernel_of_ours():
    """And the profiler would see them: ``portable`` launches one or more for each op."""
    found, count = launched(every_op("reference"))
    assert not found and count > 13
    found, _ = launched(every_op("portable"))
    assert len(found) >= 8


def test_no_generation_of_reference_launches_a_kernel_of_ours():
    """A whole model: symbols, forecasts and blocks; by default there are some."""
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    model = model.eval().requires_grad_(False).to("cuda", torch.bfloat16)
    inputs = {
        name: x.to("cuda", torch.bfloat16 if x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }
    for backend in ("reference", None):

        def run(backend=backend):
            with (
                torch.no_grad(),
                flashomni.accelerate(
                    model, "flashomni:interval=3,warmup=.1", backend=backend
                ) as engine,
            ):
                generation(engine, model, inputs, steps=10)

        found, count = launched(run)
        assert count > 100 and bool(found) == (backend is None), found
