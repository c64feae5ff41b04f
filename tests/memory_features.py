"""What users do to fit a model on a small card, by the names that docs/memory.md gives it.

Each takes a model, and puts itself on it for a device. Weights that offloading keeps away must be
seen to be away: on a CPU a group goes to a file, which leaves its weights uninitialised, and the
tests fill what is uninitialised with NaN.
"""

import tempfile

import pytest
import torch
from torch import nn


def group(level, **options):
    def put(model, device):
        from diffusers.hooks import apply_group_offloading

        away = {"offload_to_disk_path": tempfile.mkdtemp()} if device.type == "cpu" else {}
        apply_group_offloading(model, onload_device=device, offload_type=level, **options, **away)

    return put


def sequential(model, device):
    """As a pipeline does it, which sends buffers along where the model has weights of its own."""
    from accelerate import cpu_offload

    cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def whole_model(model, device):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, device)


def casting(model, device):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def each_linear(model, make):
    """Replace the Linears inside the blocks, as quantisers do."""
    lists = [m for m in model.children() if isinstance(m, nn.ModuleList)]
    for blocks in lists:
        for module in list(blocks.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, make(child))


def nf4(model, device):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def make(linear):
        options = {"bias": linear.bias is not None, "compute_dtype": linear.weight.dtype}
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, quant_type="nf4", **options
        )
        weight = linear.weight.data.cpu()
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to(device)

    each_linear(model, make)


def gguf(model, device):
    quants = pytest.importorskip("gguf.quants", reason="needs gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType

    def make(linear):
        options = {"bias": linear.bias is not None, "compute_dtype": linear.weight.dtype}
        new = GGUFLinear(linear.in_features, linear.out_features, **options)
        fits = linear.in_features % 32 == 0
        kind = GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.BF16
        packed = quants.quantize(linear.weight.data.float().cpu().numpy(), kind)
        new.weight = GGUFParameter(torch.from_numpy(packed).to(device), quant_type=kind)
        new.bias = linear.bias
        return new

    each_linear(model, make)


def torchao(name):
    def put(model, device):
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        quantization.quantize_(model, getattr(quantization, name)())

    return put


class Rank(nn.Module):
    """No Linear, and nothing called ``weight``: rounded values, and a branch of low rank."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.data
        self.scale = weight.abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (weight / self.scale).round().to(torch.int8))
        self.up, self.down = 0.01 * weight[:, :4].clone(), 0.01 * weight[:4].clone()
        self.bias = linear.bias

    def forward(self, x):
        weight = self.qweight.to(x.dtype) * self.scale + self.up @ self.down
        return nn.functional.linear(x, weight, self.bias)


def replaced(model, device):
    each_linear(model, Rank)


def both(first, second):
    def put(model, device):
        first(model, device)
        second(model, device)

    return put


BLOCKS = {"num_blocks_per_group": 1}
# Weights that are elsewhere at times, and weights that are another's.
MOVED = {
    "group offloading, a block at a time": group("block_level", **BLOCKS),
    "group offloading, several blocks": group("block_level", num_blocks_per_group=2),
    "group offloading, a leaf at a time": group("leaf_level"),
    "sequential offloading": sequential,
    "model offloading": whole_model,
}
STREAMED = {
    "group offloading with a stream, blocks": group("block_level", use_stream=True, **BLOCKS),
    "group offloading with a stream, leaves": group("leaf_level", use_stream=True),
}
CHANGED = {
    "layerwise casting": casting,
    "bitsandbytes nf4": nf4,
    "GGUF": gguf,
    "torchao, weights": torchao("Int8WeightOnlyConfig"),
    "torchao, weights and inputs": torchao("Int8DynamicActivationInt8WeightConfig"),
    "Linears of another class": replaced,
    "casting and group offloading": both(casting, group("block_level", **BLOCKS)),
    "GGUF and group offloading": both(gguf, group("leaf_level")),
}


def watch_moves(monkeypatch):
    """A list that gets a name for each group that is brought or taken away from now on."""
    from diffusers.hooks.group_offloading import ModuleGroup

    found = []
    for name in ("onload_", "offload_"):
        real = getattr(ModuleGroup, name)

        def watched(group, real=real, name=name):
            found.append(name)
            real(group)

        monkeypatch.setattr(ModuleGroup, name, watched)
    return found
