"""Norm, gate, RoPE and forecast passes are ops: an explicit backend means them too."""

import pytest
import torch

from flashomni import dispatch
from flashomni.kernels.elementwise import op as elementwise
from flashomni.kernels.elementwise.op import DifferencesCall, ModulatedNormCall, WeightedSumCall

x, y = torch.randn(2, 2, 6, 32).unbind()
gate, scale, shift = torch.randn(3, 2, 32).unbind()
TABLE = torch.randn(6, 8)


def norm_rope(x, **options):
    q = x.clone().view(2, 6, 2, 16)
    elementwise.norm_rope_(q, torch.ones(16), 1e-6, (TABLE, TABLE), **options)
    return q


PASSES = {
    "modulated_norm": lambda x, **o: elementwise.modulated_norm(x, scale, shift, 1e-6, **o),
    "gated_residual": lambda x, **o: elementwise.gated_residual(x, y, gate, **o),
    "gated_residual_norm": lambda x, **o: elementwise.gated_residual_norm(
        x, y, gate, scale, shift, 1e-6, **o
    ),
    "norm_rope": norm_rope,
    "differences": lambda x, **o: elementwise.differences(x, None, [y], [2.0], **o),
    "weighted_sum": lambda x, **o: elementwise.weighted_sum(
        [x, y], torch.tensor([1.0, 0.5]), x, torch.float16, **o
    ),
}  # fmt: skip
each = pytest.mark.parametrize("op", PASSES)


@each
def test_backends_agree_on_the_cpu(op):
    """``cpu`` is the definition, and what runs by default."""
    expected = PASSES[op](x, backend="reference")
    for backend in ("cpu", None):
        torch.testing.assert_close(PASSES[op](x, backend=backend), expected, atol=0, rtol=0)


@each
def test_compiles_into_one_node(op):
    """With tensors returned, and with one that is written in place."""
    torch.compiler.reset()
    compiled = torch.compile(PASSES[op], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), PASSES[op](x), atol=0, rtol=0)


@each
def test_an_unknown_backend_is_refused(op):
    """By name; portable says why it cannot run on this tensor or machine."""
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.*got 'abacus'"):
        PASSES[op](x, backend="abacus")


@each
def test_sm90_is_served_by_portable_and_reference_by_no_kernel(op, monkeypatch):
    """What an explicit name means, whatever the ranks."""
    asked = []
    found = tuple(
        dispatch.Backend(op, b.name, b.rank, lambda call, name=b.name: asked.append(name),
                         lambda call: [], lambda: [], b.serves)
        for b in dispatch.registered(op)
    )  # fmt: skip
    monkeypatch.setattr(dispatch, "_sorted", {**dispatch._sorted, op: found})
    monkeypatch.setattr(dispatch, "_usable", {})
    if "portable" not in {b.name for b in found}:
        pytest.skip("needs Triton")
    for name, expected in (("sm90", "portable"), ("reference", "reference"), ("cpu", "cpu")):
        assert dispatch.select(op, None, name).name == expected


def test_a_kernel_file_that_cannot_be_imported_is_a_refusal(monkeypatch):
    """Never swallowed: asked for by name, its reason is the message."""
    monkeypatch.setattr(dispatch, "_usable", {})
    monkeypatch.setitem(dispatch._broken, ("differences", "moon"), "cannot be imported: no moon")
    assert dispatch.refusals("differences")["moon"] == "cannot be imported: no moon"
    with pytest.raises(NotImplementedError, match="moon: cannot be imported: no moon"):
        elementwise.differences(x, None, [], [], backend="moon")


def test_a_family_without_helpers_takes_the_best(monkeypatch):
    """Who brings attention from outside need not write the passes."""
    for name, kept in (("_registry", dict(dispatch._registry)), ("_sorted", {}), ("_usable", {})):
        monkeypatch.setattr(dispatch, name, kept)
    dispatch.register("attention", "outside", rank=-1)(print)
    assert torch.equal(PASSES["gated_residual"](x, backend="outside"), PASSES["gated_residual"](x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_reference_on_a_gpu_selects_no_kernel():
    """And by default a GPU takes the kernels."""
    on_gpu = x.cuda()
    for op, call in (
        ("modulated_norm", ModulatedNormCall(on_gpu, scale.cuda(), shift.cuda(), 1e-6)),
        ("differences", DifferencesCall(on_gpu, None, [], [], torch.float32)),
        ("weighted_sum", WeightedSumCall([on_gpu], torch.ones(1).cuda(), None, torch.float32)),
    ):
        assert dispatch.select(op, call, "reference").name == "reference"
        assert dispatch.select(op, call).name == "portable"
