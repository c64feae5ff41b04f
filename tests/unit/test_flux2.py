"""FLUX.2: one Linear for queries, keys, values and the MLP, and modulation that blocks share."""

import pytest
import torch
from torch import nn

import flashomni
from conftest import ONES, SPARSE, call, run
from flashomni.engine.linear import linear_flops, plain_weights, project_into, split_linear
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")


class Called(nn.Linear):
    """Counts its calls; its weight must not be read."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("cls", [nn.Linear, Called])
@pytest.mark.parametrize("bias", [True, False])
def test_parts_of_a_linear_are_what_it_gives(cls, bias):
    """Slices of a plain weight; one call for all parts of what is not plain."""
    linear, x = cls(24, 7 + 16 + 9, bias), torch.randn(2, 5, 24)
    whole = nn.functional.linear(x, linear.weight, linear.bias)
    parts = split_linear(linear, x, [7, 16, 9])
    for part, expected in zip(parts, whole.split([7, 16, 9], dim=-1), strict=True):
        torch.testing.assert_close(part(x), expected)
        out = torch.full((2, 5, part.out_features), torch.nan)
        project_into(part, x, out)
        torch.testing.assert_close(out, expected)
        assert (plain_weights(part, x) is None) == (cls is Called)
    heads = torch.full((2, 5, 4, 4), torch.nan)
    project_into(parts[1], x, heads)
    torch.testing.assert_close(heads.flatten(2), whole[..., 7:23])
    assert sum(linear_flops(part, 10) for part in parts) == linear_flops(linear, 10)
    assert getattr(linear, "calls", 1) == 1


def test_parts_must_be_the_whole():
    with pytest.raises(ValueError, match=r"sizes must sum to 8, got \[3, 4\]"):
        split_linear(nn.Linear(4, 8), torch.zeros(1, 1, 4), [3, 4])


@pytest.fixture
def tiny_flux2():
    torch.manual_seed(0)
    model, inputs = adapters()["Flux2Transformer2DModel"].tiny()
    return model.eval(), dict(inputs)


def test_modulation_for_the_whole_batch(tiny_flux2):
    """One timestep for both items: the model makes modulation of a batch of one."""
    model, inputs = tiny_flux2
    shared = {**inputs, "timestep": inputs["timestep"][:1], "guidance": inputs["guidance"][:1]}
    stock = call(model, shared)
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(3):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, shared), stock, atol=1e-5, rtol=1e-4)


def test_queries_of_single_blocks_are_sparse(tiny_flux2):
    """They are rows of the Linear that holds the rest of the block as well."""
    model, inputs = tiny_flux2
    _, report = run(model, inputs, SPARSE)
    saved = {op: report.flops_executed[op] / report.flops_dense[op] for op in report.flops_dense}
    assert saved["gemm_q"] < 0.9 and saved["gemm_o"] < 1.1 and saved["mlp"] == 1


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"joint_attention_kwargs": {"other": 1}}, r"joint_attention_kwargs \['other'\]"),
        ({"kv_cache_mode": "extract", "num_ref_tokens": 9}, "joint_attention_kwargs"),
    ],
)
def test_what_would_be_lost_is_refused(tiny_flux2, given, word):
    model, inputs = tiny_flux2
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 4)
        with pytest.raises(NotImplementedError, match=word):
            call(model, {**inputs, **given})


def test_single_blocks_get_one_sequence(tiny_flux2):
    """Whoever calls a single block with two is told so, instead of getting one back."""
    model, inputs = tiny_flux2
    block = model.single_transformer_blocks[0]
    plain = block.forward

    class Two(type(model)):
        def forward(self, *args, **kwargs):
            x = torch.zeros(1, 40, 48)
            return block(x, x[:, :9], torch.zeros(1, 1, 144), split_hidden_states=True)

    assert plain(torch.zeros(1, 40, 48), None, torch.zeros(1, 1, 144)).shape == (1, 40, 48)
    model.__class__ = Two
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 4)
        with pytest.raises(NotImplementedError, match="text and vision apart"):
            model(**inputs)


def test_a_lora_on_the_fused_linear_is_applied(tiny_flux2):
    """The Linear is called then, once for all of its parts: the adapted stock model is followed."""
    peft = pytest.importorskip("peft")
    model, inputs = tiny_flux2
    bare = call(model, inputs)
    config = peft.LoraConfig(r=2, target_modules=r"single_.*(to_qkv_mlp_proj|to_out)")
    config.init_lora_weights = False
    model.add_adapter(config)
    adapted = call(model.eval(), inputs)
    assert not torch.allclose(bare, adapted, atol=1e-3)
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(5):
            engine.step(step, 6)
            torch.testing.assert_close(call(model, inputs), adapted, atol=1e-5, rtol=1e-4)
        notes = engine.report().notes
    assert any("projections ran dense" in note for note in notes)
