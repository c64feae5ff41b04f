"""Every adapter, on its own tiny random model: what the engine promises about a model."""

import copy
import itertools

import pytest
import torch
from torch import nn

import flashomni
from conftest import (
    ONES,
    SPARSE,
    STEPS,
    call,
    first_item,
    generation,
    has_sparse_queries,
    residue,
    run,
    sparse_run,
)
from flashomni.engine import Recipe
from flashomni.models import find_adapter

pytestmark = pytest.mark.usefixtures("no_grad")
# Models that read or add something between blocks, which are not cached in one then.
SPANS = {
    "WanAnimateTransformer3DModel": 2,
    "WanVACETransformer3DModel": 4,
    "ZImageTransformer2DModel": 2,
}


def lowered(value):
    """bf16 for a float tensor; ids, masks and shapes as they are."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if is_float else value


def test_all_bits_one_reproduces_the_stock_model(tiny):
    """Within fp32 rounding, on Full, Update and Dispatch steps alike."""
    model, inputs = tiny
    stock = torch.stack([call(model, inputs)] * STEPS)
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS)
            torch.testing.assert_close(call(model, inputs), stock[step], atol=1e-5, rtol=1e-4)
        kinds = {step["kind"] for step in engine.report().steps}
    assert kinds == {"update", "dispatch", "full"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_all_bits_one_in_bfloat16_is_as_exact_as_the_stock_model(tiny, device):
    """Error against fp32 at most twice that of the stock model in bf16."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, inputs = tiny
    exact = call(model, inputs).to(device)
    low = copy.deepcopy(model).to(device, torch.bfloat16)
    floats = {
        key: lowered(value).to(device) if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    limit = 2 * (call(low, floats).float() - exact).abs().max()
    with flashomni.accelerate(low, ONES) as engine:
        for step in range(4):
            engine.step(step, 6)
            assert (call(low, floats).float() - exact).abs().max() <= limit


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "recipe", ["lossless", SPARSE, "fora:level=layers"], ids=["lossless", "sparse", "fora"]
)
def test_remove_is_bit_exact_and_leaves_nothing(tiny, recipe):
    """After remove() the model computes the same bits and carries no hook."""
    model, inputs = tiny
    before, clean = call(model, inputs), residue(model)
    engine = flashomni.accelerate(model, recipe)
    generation(engine, model, inputs)
    engine.remove()
    assert torch.equal(call(model, inputs), before)
    assert residue(model) == clean
    engine.remove()  # twice is harmless


def test_sparse_steps_really_differ_and_really_skip(tiny):
    """The guard of the other tests: SPARSE computes less, and not the same."""
    model, inputs = tiny
    sparse, summary = sparse_run(model)
    first = [step["kind"] for step in summary.steps].index("dispatch")
    stock, _ = run(model, inputs, "lossless", steps=first + 1)
    torch.testing.assert_close(sparse[:first], stock[:first], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(stock[first], sparse[first], atol=1e-4)
    assert summary.flops_executed["attention"] < 0.8 * summary.flops_dense["attention"]
    gemm_q = summary.flops_executed["gemm_q"] / summary.flops_dense["gemm_q"]
    assert gemm_q < 0.9 if has_sparse_queries(model) else gemm_q == 1


def test_cpu_backend_agrees_with_the_definition(tiny):
    """The same recipe through the fp32 reference of every op gives the same pictures."""
    model, inputs = tiny
    fast, _ = run(model, inputs, SPARSE, steps=6)
    exact, _ = run(model, inputs, SPARSE, steps=6, backend="reference")
    torch.testing.assert_close(fast, exact, atol=2e-4, rtol=1e-3)


class Wrapped(nn.Linear):
    """A Linear that is not plain: its weight must not be read directly."""

    def forward(self, x):
        return super().forward(x)


def wrap_outputs(model):
    """Replace every attention output projection by an equal one that is not plain."""
    for _, module in list(model.named_modules()):
        for name in ("proj_out", "to_out"):
            child = getattr(module, name, None)
            if isinstance(child, nn.ModuleList):
                child[0] = as_wrapped(child[0])
            elif type(child) is nn.Linear and (name == "to_out" or hasattr(module, "attn")):
                setattr(module, name, as_wrapped(child))


def as_wrapped(linear):
    wrapped = Wrapped(linear.in_features, linear.out_features, bias=linear.bias is not None)
    wrapped.load_state_dict(linear.state_dict())
    return wrapped.eval()


@pytest.mark.covering(1)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_after_projection_equals_forecast_before_it(tiny, order):
    """B_i under changing masks (plain projection) = filling O with its forecast (any module)."""
    model, inputs = tiny
    recipe = SPARSE.replace(order=order, interval=3)
    projected, _ = run(model, inputs, recipe)
    other = copy.deepcopy(model)
    wrap_outputs(other)
    filled, _ = run(other, inputs, recipe)
    torch.testing.assert_close(projected, filled, atol=2e-4, rtol=1e-3)


def test_not_plain_query_projections_run_dense_and_are_named(tiny, caplog):
    """A Linear subclass is called, gives the same result; the report and the log say so."""
    model, inputs = tiny
    plain, _ = sparse_run(model)
    other = copy.deepcopy(model)
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            if name.startswith("to_q") and type(child) is nn.Linear:
                setattr(module, name, as_wrapped(child))
    called, summary = run(other, inputs, SPARSE)
    torch.testing.assert_close(plain, called, atol=2e-4, rtol=1e-3)
    assert any("Wrapped, not a plain Linear" in note for note in summary.notes)
    assert caplog.text.count("layers, projections ran dense: ") == 1
    assert summary.flops_executed["gemm_q"] == summary.flops_dense["gemm_q"]


def test_live_lora_is_applied(tiny):
    """With a live LoRA the accelerated model follows the adapted stock model, not the bare one."""
    peft = pytest.importorskip("peft")
    model, inputs = tiny
    bare = call(model, inputs)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "proj_out", "to_out.0"])
    config.init_lora_weights = False
    model.add_adapter(config)
    model.eval()
    adapted = call(model, inputs)
    assert not torch.allclose(bare, adapted, atol=1e-3)
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(6):
            engine.step(step, 6)
            torch.testing.assert_close(call(model, inputs), adapted, atol=1e-5, rtol=1e-4)


def test_a_generation_depends_on_nothing_before_it(tiny):
    """A then B gives the bits of B alone; so do two equal runs in a row."""
    model, inputs = tiny
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(0)}
    alone, _ = sparse_run(model)
    with flashomni.accelerate(model, SPARSE) as engine:
        generation(engine, model, other)
        assert torch.equal(generation(engine, model, inputs), alone)
        assert torch.equal(generation(engine, model, inputs), alone)


def test_batch_items_do_not_touch_each_other(tiny):
    """Item 0 of a batch of two gives what it gives alone."""
    model, inputs = tiny
    single = first_item(inputs)
    both, _ = sparse_run(model)
    alone, _ = run(model, single, SPARSE)
    torch.testing.assert_close(both[:, :1], alone, atol=1e-4, rtol=1e-3)


def test_branches_do_not_touch_each_other(tiny):
    """cond and uncond interleaved give what each gives alone."""
    model, inputs = tiny
    other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
    alone = [sparse_run(model)[0], run(model, other, SPARSE)[0]]
    with flashomni.accelerate(model, SPARSE) as engine:
        latents = [each["hidden_states"] for each in (inputs, other)]
        for step in range(STEPS - 3):  # behind the second Update
            for index, each in enumerate((inputs, other)):
                engine.step(step, STEPS, f"branch {index}")
                out = call(model, {**each, "hidden_states": latents[index]})
                assert torch.equal(out, alone[index][step])
                latents[index] = latents[index] - 0.05 * out
        assert {step["branch"] for step in engine.report().steps} == {"branch 0", "branch 1"}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["fora:level=layers", "taylorseer:level=layers"])
def test_whole_layer_caching_skips_attention_and_mlp(tiny, name):
    """Dispatch steps of a fully cached model execute none of the blocks' FLOPs."""
    model, inputs = tiny
    _, summary = run(model, inputs, Recipe.of(name))
    kinds = [step["kind"] for step in summary.steps]
    dense = (STEPS - kinds.count("dispatch")) / STEPS
    for op in ("attention", "gemm_q", "gemm_o", "mlp", "qkv"):
        assert summary.flops_executed[op] == pytest.approx(dense * summary.flops_dense[op])
    bypassed = [s for s in summary.steps if s["kind"] == "dispatch"]
    assert all(set(s["layer_kinds"]) == {"bypass"} for s in bypassed)


def test_whole_layer_caching_keeps_no_heads(tiny):
    """Layers that are cached whole hold what they add together, and nothing of their own."""
    model, inputs = tiny
    with flashomni.accelerate(model, "fora:level=layers") as engine:
        for step in range(4):
            engine.step(step, STEPS)
            call(model, inputs)
        branch = engine._runtime.last.branches["call"]
        assert all(not layer.history and layer.bias_terms is None for layer in branch.layers)
        kept = sorted(tuple(t.shape) for t in branch.groups[0].spans.tensors())
        found = find_adapter(model)
        runs = itertools.groupby(site.streams for site in found.sites(model))
        streams = SPANS.get(found.transformer) or sum(len(names) for names, _ in runs)
        assert len(kept) == streams and kept[0][0] == 2  # one term of a stream, for a run of layers
