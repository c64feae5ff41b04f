"""``backend=`` is taken at its word: by every op of every step of a whole generation."""

import pytest
import torch

from conftest import SPARSE, generation, has_sparse_queries
from flashomni import accelerate, dispatch
from flashomni.engine import Recipe

RECIPES = {
    "topk": SPARSE,
    "flashomni": Recipe.of(
        "flashomni", interval=3, warmup=0.2, order=1, tau_q=0.6, tau_kv=0.3, similarity_gate=0.2
    ),
    "spargeattn": Recipe.of("spargeattn", interval=3, warmup=0.2, mass=0.6, similarity_gate=0.2),
    "whole layers": Recipe.of("cached", interval=3, warmup=0.2, order=1, degrade_below=0.5),
    "output": Recipe.of("cached", interval=3, warmup=0.2, order=1, level="output"),
}
# (backend, device): on a GPU the definition, which runs no Triton kernel, and the Triton kernels.
WHERE = [
    ("reference", "cpu"),
    ("cpu", "cpu"),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu),
    pytest.param("portable", "cuda", marks=pytest.mark.gpu),
]
PASSES = {"differences", "weighted_sum"}
SPARSE_OPS = {"attention", "gemm_q", "gemm_o", "gemm_o_update", "norm_rope", "choose", "measure"}
NEEDED = {
    "topk": {*SPARSE_OPS, "live_share", "differences"},
    "flashomni": {*SPARSE_OPS, "live_share", "differences"},
    "spargeattn": {"attention", "norm_rope", "choose", "measure"},
    "whole layers": {"attention", "norm_rope", *PASSES},
    "output": {"attention", "norm_rope", *PASSES},
}

NO_NORM_ROPE = {"CogVideoXTransformer3DModel"}  # LayerNorms, and positions that are added before


@pytest.fixture
def chosen(monkeypatch):
    """``{(op, what was asked for, what was chosen)}`` of all that is dispatched from now on."""
    seen, select = set(), dispatch.select

    def spy(op, call, name=None):
        backend = select(op, call, name)
        seen.add((op, name, backend.name))
        return backend

    monkeypatch.setattr(dispatch, "select", spy)
    return seen


@pytest.mark.covering(2)
@pytest.mark.parametrize(("backend", "device"), WHERE)
@pytest.mark.parametrize("name", RECIPES)
def test_every_op_takes_the_backend_that_was_asked_for(
    chosen, no_grad, tiny, name, backend, device
):
    """In Full, Update, Dispatch and bypassed layers alike; nobody asks for none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, inputs = tiny
    inputs = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    with accelerate(model.to(device), RECIPES[name], backend=backend) as engine:
        assert generation(engine, model, inputs, steps=8).isfinite().all()
        kinds = {step["kind"] for step in engine.report().steps}
    assert kinds == {"full", "update", "dispatch"}
    left_out = set() if has_sparse_queries(model) else {"gemm_q"}
    left_out |= {"norm_rope"} if type(model).__name__ in NO_NORM_ROPE else set()
    assert NEEDED[name] - left_out <= {op for op, _, _ in chosen}
    assert {asked for _, asked, _ in chosen} == {backend}
    assert {got for _, _, got in chosen} == {backend}
