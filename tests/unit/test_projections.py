"""Queries and keys as blocks have them: RoPE by item, by head, half-split; norms of any span."""

import pytest
import torch
from torch import nn

import flashomni
from conftest import call
from flashomni.engine import Recipe
from flashomni.kernels.common.rope import apply_rope
from flashomni.models import Adapter, Site, _accelerate
from flashomni.models.blocks import joint_attention, own_stream
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")

HEADS, DIM, ROWS = 2, 8, 70
TILES = Recipe.of(
    make_policy("topk", q_density=0.5, kv_density=1.0),
    interval=3, warmup=0.0, block_m=16, block_n=16,
)  # fmt: skip


class Attention(nn.Module):
    """Self-attention with what is to be tried."""

    def __init__(self, norm, layout, own, gated=False):
        super().__init__()
        width = HEADS * DIM
        self.heads, self.inner_dim, self.layout = HEADS, width, layout
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        across = norm in ("across", "layer")
        cls, span = (nn.LayerNorm if norm == "layer" else nn.RMSNorm), width if across else DIM
        self.norm_q, self.norm_k = (cls(span) if norm else None for _ in range(2))
        self.across = across
        self.to_gate = nn.Linear(width, HEADS) if gated else None
        shape = (2, ROWS, HEADS, DIM // 2) if own else (ROWS, DIM // 2)
        angle = torch.rand(shape) * 6
        self.tables = angle.cos(), angle.sin()

    def heads_of(self, x, linear, norm):
        q = linear(x)
        q = norm(q) if norm is not None and self.across else q
        q = q.unflatten(-1, (HEADS, DIM))
        q = norm(q) if norm is not None and not self.across else q
        return apply_rope(q, *self.tables, self.layout).transpose(1, 2)

    def forward(self, x):
        q, k = self.heads_of(x, self.to_q, self.norm_q), self.heads_of(x, self.to_k, self.norm_k)
        v = self.to_v(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        o = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        gate = self.gate(x)
        return self.to_out((o if gate is None else o * gate).flatten(2))

    def gate(self, x):
        return None if self.to_gate is None else torch.sigmoid(self.to_gate(x))[..., None]


class Block(nn.Module):
    def __init__(self, *which):
        super().__init__()
        self.attn = Attention(*which)

    def forward(self, hidden_states):
        return hidden_states + self.attn(hidden_states)


class Model(nn.Module):
    def __init__(self, *which):
        super().__init__()
        self.blocks = nn.ModuleList(Block(*which) for _ in range(3))

    def forward(self, hidden_states, return_dict=False):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


def run_block(run, block, hidden_states):
    run.begin(ROWS)
    attn = block.attn
    stream = own_stream(attn, hidden_states, (0, ROWS), attn.tables, rope_layout=attn.layout)
    o = joint_attention(run, attn, [stream], attn.to_out, gate=attn.gate(hidden_states))
    return hidden_states + run.project_o(o, attn.to_out, row_offset=0)


class ToyAdapter(Adapter):
    def sites(self, model):
        return [
            Site(f"blocks.{i}", block, run_block, ("hidden_states",), "hidden_states")
            for i, block in enumerate(model.blocks)
        ]


@pytest.mark.parametrize("own", [False, True], ids=["shared tables", "own tables"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("norm", [None, "head", "across", "layer"])
def test_every_kind_of_queries_is_exact(monkeypatch, norm, layout, own):
    """Constant inputs: every step equals stock. Queries are sparse where a head needs no other."""
    monkeypatch.setattr(_accelerate, "find_adapter", lambda model: ToyAdapter())
    torch.manual_seed(0)
    model, inputs = Model(norm, layout, own), {"hidden_states": torch.randn(2, ROWS, HEADS * DIM)}
    stock = call(model, inputs)
    with flashomni.accelerate(model, TILES) as engine:
        for step in range(5):
            engine.step(step, 6)
            torch.testing.assert_close(call(model, inputs), stock, atol=1e-5, rtol=1e-4)
        report = engine.report()
    saved = report.flops_executed["gemm_q"] < report.flops_dense["gemm_q"]
    assert saved == (norm in (None, "head"))


class Called(nn.Linear):
    """A Linear that is called, never read: then O is forecast instead of its projection."""

    def forward(self, x):
        return super().forward(x)


def gated(monkeypatch, called):
    """A model with gates between attention and projection, its input, and one a step later."""
    monkeypatch.setattr(_accelerate, "find_adapter", lambda model: ToyAdapter())
    torch.manual_seed(0)
    model = Model("head", "interleaved", False, True)
    for block in model.blocks:
        if called:
            block.attn.to_out.__class__ = Called
        block.attn.to_gate.weight.mul_(4)
    return model, {"hidden_states": torch.randn(2, ROWS, HEADS * DIM)}


@pytest.mark.parametrize("called", [False, True], ids=["projected", "filled in"])
@pytest.mark.parametrize("order", [0, 1])
def test_gates_are_cached_with_what_they_gate(monkeypatch, called, order):
    """Constant inputs: exact, whether O is forecast or its projection; no tile is gated twice."""
    model, inputs = gated(monkeypatch, called)
    stock = call(model, inputs)
    with flashomni.accelerate(model, TILES.replace(order=order)) as engine:
        for step in range(8):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, inputs), stock, atol=1e-5, rtol=1e-4)


def test_gated_forecasts_agree(monkeypatch):
    """Moving inputs: the forecast of gated O, and its projection, give the same picture."""
    outputs = []
    for called in (False, True):
        model, inputs = gated(monkeypatch, called)
        with flashomni.accelerate(model, TILES.replace(order=1)) as engine:
            for step in range(6):
                engine.step(step, 9)
                out = call(model, {"hidden_states": inputs["hidden_states"] * (1 + 0.1 * step)})
        outputs.append(out)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("called", [False, True], ids=["projected", "in front"])
def test_what_sparse_attention_misses_is_gated_too(monkeypatch, called):
    """Constant inputs: with it carried, sparse attention is exact behind a gate as well."""
    model, inputs = gated(monkeypatch, called)
    stock = call(model, inputs)
    policy = make_policy("topk", q_density=1.0, kv_density=0.4)
    recipe = Recipe.of(
        policy, interval=3, warmup=0.0, block_m=16, block_n=16, carry="hold", order=0
    )
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(5):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, inputs), stock, atol=1e-5, rtol=1e-4)
        report = engine.report()
    assert report.flops_executed["attention"] < report.flops_dense["attention"]
