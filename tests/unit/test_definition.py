"""A Dispatch step of an adapter against the stock model, whose attention follows the symbols.

What the symbols say is written out here in terms of stock attention: tokens of skipped blocks are
masked, and rows of cached blocks get what attention gave when they were chosen. Projections, norms,
RoPE and whatever else a block does are the stock model's.
"""

from dataclasses import replace

import pytest
import torch
from tiny_models import fill_gates
from torch.overrides import TorchFunctionMode

import flashomni
from conftest import call, self_attention, token_masks
from flashomni.engine import Recipe
from flashomni.models import find_adapter
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

POLICY = make_policy("topk", q_density=0.6, kv_density=0.5)
TEXT_MOVED = {"QwenImageTransformer2DModel": 77}  # first in stock, last in its adapter
SETTINGS = {"interval": 4, "warmup": 0.0, "order": 0, "block_m": 32, "block_n": 32}


class ByHand(TorchFunctionMode):
    """Attention of the blocks, by what is known of each.

    Args:
        symbols: of each attention, by its place.
        moved: tokens that come first in stock and last in the symbols' grid.
        before: what attention gave in each block, before; ``None`` has it kept.
        gates: of each block so far, ``[B, H, S, 1]``: gated O is what is cached, so what was kept
            is divided by the gate that the stock model is about to apply.
    """

    def __init__(self, symbols, moved, before, gates):
        super().__init__()
        self.symbols, self.moved, self.before, self.kept = symbols, moved, before, []
        self.gates = gates

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, *rest = args if args else (kwargs.pop(name) for name in ("query", "key", "value"))
        place = len(self.kept)
        sizes = {symbols.grid.seqlen_q for symbols in self.symbols[place : place + 1]}
        if {q.shape[2], k.shape[2]} != sizes:  # attention to the text, or of a refiner
            return func(q, k, v, *rest, **kwargs)
        gate = self.gates[place] if self.gates else 1.0
        if self.before is None:
            o = func(q, k, v, *rest, **kwargs)
            self.kept.append(o * gate)
            return o
        symbols = self.symbols[place]  # whose padding the stock model masks itself
        rows, pairs = token_masks(replace(symbols, grid=replace(symbols.grid, kv_len=None)))
        rows, pairs = rows.roll(self.moved, -1), pairs.roll((self.moved,) * 2, (-2, -1))
        given = kwargs.pop("attn_mask", None)
        mask = pairs if given is None else pairs & given
        o = func(q, k, v, *rest, attn_mask=mask, **kwargs)
        self.kept.append(o * gate)
        return torch.where(rows[..., None], o, self.before[place] / gate)


def watch_gates(model):
    """Hooks on what makes the gates of each block's attention, and the gates, as they are made."""
    seen = []

    def see(module, args, output):
        seen.append(2 * output.sigmoid().transpose(1, 2)[..., None])

    attentions = (self_attention(site.block) for site in find_adapter(model).sites(model))
    makers = [getattr(attn, "to_gate_logits", None) for attn in attentions]
    return [maker.register_forward_hook(see) for maker in makers if maker is not None], seen


def test_a_dispatch_step_is_what_its_symbols_say(tiny):
    """Tiles chosen and computed in one step, used with other latents in the next."""
    model, inputs = tiny
    fill_gates(model)
    other = {**inputs, "hidden_states": inputs["hidden_states"].flip(0)}
    with flashomni.accelerate(model, Recipe.of(POLICY, **SETTINGS)) as engine:
        engine.step(0, 8)
        call(model, inputs)
        engine.step(1, 8)
        got = call(model, other)
        assert engine.report().steps[1]["kind"] == "dispatch"
        layers = engine._runtime.last.branches["call"].layers
        pairs = [(layer, layer.beside) for layer in layers]  # some blocks attend twice
        symbols = [cache.symbols for pair in pairs for cache in pair if cache is not None]
    moved = TEXT_MOVED.get(type(model).__name__, 0)
    outputs, before = [], None
    gates, seen = watch_gates(model)
    for each in (inputs, other):
        seen.clear()
        with ByHand(symbols, moved, before, seen) as mode:
            outputs.append(call(model, each))
        before = mode.kept
        assert len(before) == len(symbols)
    for handle in gates:
        handle.remove()
    torch.testing.assert_close(got, outputs[1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(got, call(model, other), atol=1e-3)  # the step is really sparse
