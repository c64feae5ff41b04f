"""Carry on a card: the merge at real sizes, recordings, and D in pinned host memory."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

import flashomni
from conftest import STEPS, generation, run
from flashomni.engine.state.columns import Columns
from flashomni.kernels import refresh, sparse_attention, summarise
from flashomni.models import adapters
from flashomni.symbols import Grid, Symbols

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]

RECIPE = (
    "topk:q_density=1,kv_density=.5,interval=1,warmup=0,in_computed=true,block_m=64,block_n=64,"
    "choose_at=[1],dense_steps=2,carry=extrapolate,refresh=3,summaries=4"
)


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval().cuda(), {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("per_block", [0, 1, 4, 16])
@pytest.mark.parametrize("backend", [None, "portable"])
def test_out_and_difference_are_dense_at_real_sizes(backend, per_block):
    """4,200 tokens in bf16: the sum is dense attention, the sparse part what it is alone.

    D is as large as what is skipped, here about 1.5 times dense attention, so its rounding counts:
    the measure is a D of torch's dense attention.
    """
    torch.manual_seed(per_block)
    shape, grid = (1, 4200, 4, 128), Grid(4200, 4200, text=(0, 77))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = torch.rand(1, 4, grid.num_q_blocks, grid.num_kv_blocks, device="cuda") < 0.25
    columns = Columns.of(Symbols.pack(torch.ones_like(mask[..., 0]), mask, grid), True)
    summary = summarise(k, v, grid, per_block) if per_block else None
    out, difference = refresh(q, k, v, columns.symbols, summary=summary, backend=backend)
    exact, stock = (
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given))
        for given in ([x.float() for x in (q, k, v)], (q, k, v))
    )
    exact, stock = exact.transpose(1, 2), stock.transpose(1, 2)
    alone = sparse_attention(q, k, v, columns.symbols, summary=summary)

    def error(out, difference):
        return (out.float() + difference.float() - exact).abs().max()

    assert error(out, difference) <= 2 * error(alone, stock - alone)
    torch.testing.assert_close(out.float(), alone.float(), atol=2e-2, rtol=2e-2)
    text = slice(0, 77)
    assert not difference[:, text].any()  # text rows visit every key


def test_recorded_steps_give_the_same_bits(flux):
    """Sparse steps and refreshes as CUDA graphs."""
    model, inputs = flux
    expected, _ = run(model, inputs, RECIPE)
    with flashomni.accelerate(model, RECIPE, graphs=True) as engine:
        for _ in range(3):
            assert torch.equal(generation(engine, model, inputs), expected)
        before = engine._runtime.graphs.replays
        assert torch.equal(generation(engine, model, inputs), expected)
        assert engine._runtime.graphs.replays - before == STEPS, engine.report().notes


def test_carry_in_host_memory_is_the_same(flux):
    """D in pinned memory: the same bits, none of it on the device."""
    model, inputs = flux
    expected, device = run(model, inputs, RECIPE)
    got, host = run(model, inputs, RECIPE + ",history_device=host")
    assert torch.equal(got, expected)
    assert host.cache_bytes_host > 0.9 * (device.cache_bytes - host.cache_bytes) > 0
    assert any("host memory" in note for note in host.notes)


def test_carry_in_host_memory_takes_few_buffers_of_the_device():
    """Of ``[tokens, hidden]``, at the peak, beside the same recipe without carry: about three."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
    small = adapters()["FluxTransformer2DModel"].sizes["tiny"]
    model = FluxTransformer2DModel(**small | sizes).eval().to("cuda", torch.bfloat16)
    given = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, 8192, 16, **given),
        "encoder_hidden_states": torch.randn(1, 128, 24, **given),
        "pooled_projections": torch.randn(1, 20, **given),
        "timestep": torch.full((1,), 0.5, **given),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 64, 128))).to(**given),
        "txt_ids": torch.zeros(128, 3, **given),
        "guidance": torch.full((1,), 3.5, **given),
    }

    def peak(recipe):
        run(model, inputs, recipe)
        torch.cuda.reset_peak_memory_stats()
        run(model, inputs, recipe)
        return torch.cuda.max_memory_allocated()

    unit = (8192 + 128) * 256 * 2
    recipe = RECIPE + ",degrade_below=1,layer_order=0"
    without = recipe.replace("carry=extrapolate,refresh=3,", "")
    beside = peak(recipe + ",history_device=host") - peak(without)
    assert beside <= 3.5 * unit


def test_a_graph_that_host_memory_prevents_says_so(flux):
    """Nothing is recorded, the bits are the same, and the report has the reason."""
    model, inputs = flux
    recipe = RECIPE + ",history_device=host"
    expected, _ = run(model, inputs, recipe)
    with flashomni.accelerate(model, recipe, graphs=True) as engine:
        for _ in range(2):
            assert torch.equal(generation(engine, model, inputs), expected)
        assert any("no CUDA graphs: " in note for note in engine.report().notes)
