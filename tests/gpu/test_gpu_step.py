"""A whole step on a GPU: its ops in one graph, captured or compiled, and no wait for the device."""

import pytest
import torch

import flashomni
from conftest import ONES, SPARSE, call, generation, random_symbols
from flashomni.kernels import sparse_attention, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.common.rope import pack_rope
from flashomni.symbols import Grid, Symbols

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SEQLEN, HEADS, HEAD_DIM = 900, 4, 128


@pytest.fixture
def layer():
    """Weights, tables and symbols of one layer, in bf16."""
    width, kind = HEADS * HEAD_DIM, {"device": "cuda", "dtype": torch.bfloat16}
    angle = torch.rand(SEQLEN, HEAD_DIM // 2, device="cuda").repeat_interleave(2, -1) * 6
    return {
        "x": torch.randn(1, SEQLEN, width, **kind),
        "weights": torch.randn(2, width, width, **kind) / width**0.5,
        "norm": torch.rand(HEAD_DIM, **kind) + 0.5,
        "rope": pack_rope(angle.cos(), angle.sin()),
        "kv": torch.randn(2, 1, SEQLEN, HEADS, HEAD_DIM, **kind),
        "terms": torch.randn(2, 1, SEQLEN, width, **kind),
        "coefficients": torch.tensor([0.7, -0.3], device="cuda"),
        "symbols": random_symbols(Grid(SEQLEN, SEQLEN), 1, HEADS, 0.6, 0.5).to("cuda"),
    }


def dispatch_step(layer, x, out):
    """What a layer runs on a Dispatch step: GEMM-Q, attention, GEMM-O."""
    symbols, (k, v) = layer["symbols"], layer["kv"]
    norm = {"norm_weight": layer["norm"], "norm_eps": 1e-6, "rope": layer["rope"]}
    q = torch.zeros_like(k)
    sparse_gemm_q(x, layer["weights"][0], None, symbols, out=q, **norm)
    o = sparse_attention(q, k, v, symbols, out=torch.zeros_like(q))
    terms, coefficients = layer["terms"], layer["coefficients"]
    return sparse_gemm_o(o, layer["weights"][1], None, symbols, terms, coefficients, out=out)


def test_replays_in_one_cuda_graph(layer):
    """Other inputs and other symbols, same graph, the same bits as without it."""
    out = torch.zeros_like(layer["x"])
    dispatch_step(layer, layer["x"], out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dispatch_step(layer, layer["x"], out)
    for density in (0.1, 0.5, 1.0):
        other = random_symbols(layer["symbols"].grid, 1, HEADS, density, density).to("cuda")
        layer["symbols"].q_bits.copy_(other.q_bits)
        layer["symbols"].kv_bits.copy_(other.kv_bits)
        layer["x"].normal_()
        expected = dispatch_step(layer, layer["x"], torch.zeros_like(out))
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected) and expected.isfinite().all()


def test_compiles_into_one_graph(layer):
    """``torch.compile(fullgraph=True)`` with the default backend."""
    bits = layer["symbols"]

    def step(x, q_bits, kv_bits):
        symbols = Symbols(q_bits, kv_bits, bits.grid)
        return dispatch_step({**layer, "symbols": symbols}, x * 2, torch.zeros_like(x)) + 1

    arguments = (layer["x"], bits.q_bits, bits.kv_bits)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), step(*arguments), atol=0.03, rtol=0.02)


def waits(run):
    """Whether torch sees ``run`` wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        assert "synchronizing" in str(error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


@pytest.mark.parametrize(
    "recipe",
    [ONES, SPARSE, SPARSE.replace(history_device="host"), "balanced"],
    ids=["ones", "sparse", "host", "whole"],
)
def test_no_step_waits_for_the_device(no_grad, tiny, recipe):
    """Full, Update and Dispatch steps under torch's check for synchronisation."""
    model, inputs = tiny
    model = model.to("cuda")
    inputs = {
        name: value.to("cuda") if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    call(model, inputs)
    if waits(lambda: call(model, inputs)):
        pytest.skip(f"{type(model).__name__} of diffusers waits by itself")
    with flashomni.accelerate(model, recipe) as engine:
        expected = generation(engine, model, inputs)  # compiles; fills what is made once
        outputs = []
        assert not waits(lambda: outputs.append(generation(engine, model, inputs)))
    assert torch.equal(outputs[0], expected)
