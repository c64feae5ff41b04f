"""What an adapter assumes of its inputs and of its model: any text mask, and stock modules."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flashomni
from conftest import ONES, call, self_attention
from flashomni.engine.linear import is_rms_norm
from flashomni.models import adapters, find_adapter, qwen_image
from flashomni.models.blocks import Inputs

pytestmark = pytest.mark.usefixtures("no_grad")

MASKS = {
    "prefix": lambda n: torch.arange(n) < torch.tensor([[n], [30]]),
    "left padding": lambda n: torch.arange(n) >= torch.tensor([[0], [n - 30]]),
    "holes": lambda n: torch.arange(n) % torch.tensor([[2], [3]]) != 0,
    "all valid": lambda n: torch.ones(2, n, dtype=torch.bool),
    "all padded in one item": lambda n: torch.tensor([[True], [False]]).expand(2, n),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.slow
def test_any_text_mask_of_qwen_image(kind):
    """Left padding and holes too: all bits one equals the stock model on every kind of step."""
    torch.manual_seed(0)
    model, inputs = adapters()["QwenImageTransformer2DModel"].tiny()
    check_mask(model.eval(), {**inputs, "encoder_hidden_states_mask": MASKS[kind](77)})


def test_the_text_mask_of_qwen_image_as_it_came_before_diffusers_039():
    """The model joined it to one of all keys; a user's own is left to be refused."""
    mask = MASKS["holes"](77).expand(2, -1).long()
    joint = torch.cat([mask.bool(), torch.ones(2, 342, dtype=torch.bool)], 1)[:, None, None]
    x, c = torch.zeros(2, 342, 8), torch.zeros(2, 77, 8)

    def rest(given, **extra):
        run = SimpleNamespace(
            inputs={"encoder_hidden_states_mask": mask, "attention_kwargs": given},
            shared=lambda make, *inputs: make(*inputs),
        )
        named = {"joint_attention_kwargs": extra, "encoder_hidden_states_mask": None}
        return qwen_image._with_text_mask(run, Inputs(x, c, named)).rest

    found = rest(None, attention_mask=joint, scale=0.5)
    assert torch.equal(found["encoder_hidden_states_mask"], mask.bool())
    assert found["joint_attention_kwargs"] == {"scale": 0.5}
    found = rest({"attention_mask": joint}, attention_mask=joint)
    assert found["joint_attention_kwargs"]["attention_mask"] is joint
    assert rest(None)["encoder_hidden_states_mask"] is None


@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "all padded in one item"])
def test_any_text_mask_of_hunyuan_video(kind):
    """The model itself turns any mask into a count (of no token at all it gives NaN)."""
    torch.manual_seed(0)
    model, inputs = adapters()["HunyuanVideoTransformer3DModel"].tiny()
    check_mask(model.eval(), {**inputs, "encoder_attention_mask": MASKS[kind](75).long()})


def check_mask(model, inputs):
    stock = call(model, inputs)
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(3):
            engine.step(step, 10)
            torch.testing.assert_close(call(model, inputs), stock, atol=1e-5, rtol=1e-4)


def attention(model):
    return self_attention(find_adapter(model).sites(model)[0].block)


def stock_name(thing):
    """An object of another class that has the name of ``thing``'s."""
    return type(type(thing).__name__, (type(thing),), {"__module__": "elsewhere"})


def own_forward(model):
    attention(model).forward = lambda *args, **kwargs: None


def pre_hook(model):
    attention(model).register_forward_pre_hook(lambda *_: None)


def other_processor(model):
    attn = attention(model)
    attn.processor = stock_name(attn.processor)()


def other_attention(model):
    attention(model).__class__ = stock_name(attention(model))


def other_block(model):
    block = find_adapter(model).sites(model)[1].block
    block.__class__ = stock_name(block)


@pytest.mark.parametrize(
    "change", [own_forward, pre_hook, other_processor, other_attention, other_block]
)
def test_what_is_taken_apart_must_be_stock(tiny, change):
    """A hook, a forward or a class of the same name that would be left out is refused by name."""
    model, _ = tiny
    find_adapter(model).check(model)
    change(model)
    with pytest.raises(NotImplementedError, match=r"(blocks|noise_refiner|layers)\.[01]"):
        flashomni.accelerate(model)


def test_hooks_on_norms_are_honoured(tiny):
    """A norm that carries a hook is called."""
    model, inputs = tiny
    attention(model).norm_q.register_forward_hook(lambda module, args, out: 3 * out)
    stock = call(model, inputs)
    with flashomni.accelerate(model, ONES) as engine:
        engine.step(0, 10)
        torch.testing.assert_close(call(model, inputs), stock, atol=1e-5, rtol=1e-4)


def test_only_a_norm_over_one_head_is_fused():
    """By its width and by where its class comes from, not by its name."""
    assert is_rms_norm(nn.RMSNorm(16), 16) and is_rms_norm(None, 16)
    assert not is_rms_norm(nn.RMSNorm(48), 16)
    assert not is_rms_norm(stock_name(nn.RMSNorm(16))(16), 16)


def test_checking_costs_less_than_a_millisecond_for_60_blocks(tiny):
    """It runs at the start of each generation."""
    model, _ = tiny
    found = find_adapter(model)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        found.check(model)
        times.append(time.perf_counter() - start)
    assert min(times) / len(found.sites(model)) * 60 < 2e-3  # twice that, for slow machines
