"""Quantised weights and offloaded models: modules are called, never taken apart."""

import pytest
import torch

import flashomni
from conftest import SPARSE, STEPS, call, run
from flashomni.lab import zoo

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONFIGS = ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"]


@pytest.fixture
def quantise():
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    return lambda model, name: quantization.quantize_(model, getattr(quantization, name)())


def moved(tiny, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, inputs = tiny
    if device == "cpu":
        return model, inputs
    is_float = torch.is_floating_point
    inputs = {
        name: value.to(device, torch.bfloat16 if is_float(value) else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
    return model.to(device, torch.bfloat16), inputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS)
def test_torchao_weights(no_grad, tiny, quantise, device, config):
    """Dense steps are those of the quantised stock model; every projection that a Dispatch step
    then runs whole is named; attention still skips."""
    model, inputs = moved(tiny, device)
    quantise(model, config)
    stock = call(model, inputs)
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, STEPS)
        tolerance = 1e-5 if device == "cpu" else 0.05
        torch.testing.assert_close(call(model, inputs), stock, atol=tolerance, rtol=tolerance)
    latents, summary = run(model, inputs, SPARSE)
    assert latents.isfinite().all()
    of_layers = [note for note in summary.notes if note.partition(":")[0] in summary.layers]
    assert {note.partition(":")[0] for note in of_layers} == set(summary.layers)
    assert all("not a dense tensor" in note for note in of_layers)
    no_graphs = [note for note in summary.notes if note.startswith("no CUDA graphs")]
    assert len(no_graphs) == (device == "cuda")  # where such weights lie is not known
    assert all(" holds a " in note for note in no_graphs)
    assert summary.flops_executed["attention"] < 0.8 * summary.flops_dense["attention"]
    for op in ("gemm_q", "gemm_o"):
        assert summary.flops_executed[op] == summary.flops_dense[op]
    assert torch.equal(call(model, inputs), stock)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", zoo.RANDOM)
@pytest.mark.parametrize("recipe", [SPARSE, SPARSE.replace(history_device="host"), "balanced"])
def test_model_cpu_offload_gives_the_same_picture(name, recipe):
    """``enable_model_cpu_offload`` moves weights between calls; symbols and caches stay right."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    small = {
        "tiny-image": {"height": 128, "width": 144, "num_inference_steps": 12},
        "tiny-video": {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 12},
    }

    def picture(offload):
        loaded = zoo.random_pipeline(name, heads=2, head_dim=64, dual=1, single=2)
        pipe = loaded.pipe
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_model_cpu_offload() if offload else pipe.to("cuda")
        with flashomni.accelerate(pipe, recipe) as engine:
            arguments = {**loaded.call, **small[name]}
            result = pipe(
                "a red circle", **arguments, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            )[0]  # fmt: skip
            assert {"update", "dispatch"} <= {step["kind"] for step in engine.report().steps}
        return result.cpu()

    torch.testing.assert_close(picture(True), picture(False), atol=0, rtol=0)
