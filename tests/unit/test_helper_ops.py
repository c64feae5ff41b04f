"""Norm, gate, RoPE and forecast passes are ops: an explicit backend means them too."""

import pytest
import torch

from flashomni import dispatch
from flashomni.kernels.elementwise import op as elementwise
from flashomni.kernels.elementwise.op import DifferencesCall, ModulatedNormCall, WeightedSumCall
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice import op as choice

x, y = torch.randn(2, 2, 6, 32).unbind()
gate, scale, shift = torch.randn(3, 2, 32).unbind()
TABLE = torch.randn(6, 8)
OWN = torch.randn(2, 6, 1, 8)  # a table of each item


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


HALF, LONG = torch.ones(2, 6, 32, dtype=torch.int32), torch.ones(7)
Q, ONE = torch.ones(2, 6, 2, 16), torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("modulated_norm", HALF, scale, shift, 1e-6), "x must be float32 or .*, got int32"),
        (("modulated_norm", None, scale, shift, 1e-6), "x must be a tensor, got None"),
        (("modulated_norm", x[0], scale, shift, 1e-6), r"x must be \[B, R, K\], got \[6, 32\]"),
        (("modulated_norm", x, scale[:1], shift, 1e-6), r"scale must be \[2, 32\], got \[1, 32\]"),
        (("modulated_norm", x, scale, 2.0, 1e-6), "shift must be a tensor, got float"),
        (("modulated_norm", x, scale, shift, -1.0), "eps must be at least 0, got -1.0"),
        (("modulated_norm", x, scale, shift, "tiny"), "eps must be a number, got str"),
        (("gated_residual", x, y[:, :5], gate), r"y must be \[2, 6, 32\], got \[2, 5, 32\]"),
        (("gated_residual", x, y, gate[:, None]), r"gate must be \[2, 32\], got \[2, 1, 32\]"),
        (("modulated_norm", x, scale, shift, 1e-6, ONE), r"weight must be \[32\], got \[1\]"),
        (("modulated_norm", x, scale, shift, 1e-6, gate[0].half()), "weight must be float32, got"),
        (
            ("modulated_norm", x, scale, shift, 1e-6, None, "batch"),
            "kind must be one of layer, rms",
        ),
        (("gated_residual", x, y, gate, None, gate[0]), "weight needs eps, got None"),
        (("gated_residual", x, y, gate, -1.0), "eps must be at least 0, got -1.0"),
        (("gated_residual", x, y.to("meta"), gate), "y must be on cpu, got meta"),
        (("gated_residual_norm", x, y, gate, scale, x, 1e-6), r"shift must be \[2, 32\]"),
        (("norm_rope_", x, None, 1e-6, None), r"q must be \[B, R, H, D\], got \[2, 6, 32\]"),
        (("norm_rope_", Q, torch.ones(8), 1e-6, None), r"weight must be \[16\], got \[8\]"),
        (("norm_rope_", Q, torch.ones(16), None, None), "weight needs eps, got None"),
        (("norm_rope_", Q, None, None, (TABLE,)), r"rope must be a pair \(cos, sin\)"),
        (("norm_rope_", Q, None, None, (TABLE, LONG)), r"rope sin must be \[6, 8\], got \[7\]"),
        (("norm_rope_", Q, None, None, (TABLE.half(), TABLE)), "rope cos must be float32, got"),
        (
            ("norm_rope_", Q, None, None, (TABLE, TABLE), "third"),
            "rope_layout must be one of inter",
        ),
        (
            ("norm_rope_", Q, None, None, (OWN, OWN[:1])),
            r"rope sin must be \[2, 6, 1, 8\], got \[1,",
        ),
        (("norm_rope_", Q, None, None, (OWN[:, :5],) * 2), r"rope cos must be \[2, 6, 1, 8\], got"),
        (("norm_rope_", Q[..., :3], None, None, (TABLE, TABLE)), "rope needs an even head_dim"),
        (("differences", x, y[:1], [], []), r"minus must be \[2, 6, 32\], got \[1, 6, 32\]"),
        (("differences", x, None, [y] * 4, [1.0] * 4), "old must hold 0 to 3 tensors, got 4"),
        (("differences", x, None, [y, LONG], [1.0] * 2), r"old\[1\] must be \[2, 6, 32\]"),
        (("differences", x, None, [y], []), "gaps must be as many as old, 1, got 0"),
        (("differences", x, None, [y], [0.0]), r"gaps\[0\] must not be 0"),
        (("differences", x, None, [y], [float("nan")]), r"gaps\[0\] must be finite"),
        (("differences", x, None, [], [], torch.int8), "dtype must be .*float64, got torch.int8"),
        (("weighted_sum", [], ONE, None, x.dtype), "terms must hold 1 to 4 tensors, got 0"),
        (("weighted_sum", x, ONE, None, x.dtype), "terms must be a list of tensors, got Tensor"),
        (("weighted_sum", [x, LONG], ONE, None, x.dtype), r"terms\[1\] must be \[2, 6, 32\]"),
        (("weighted_sum", [x, y], ONE, None, x.dtype), r"coefficients must be \[T\], T at least 2"),
        (("weighted_sum", [x], ONE.half(), None, x.dtype), "coefficients must be float32"),
        (("weighted_sum", [x], ONE, HALF, x.dtype), "base must be float32 or"),
    ],
    ids=lambda one: one if isinstance(one, str) else one[0],
)
def test_refusals_name_the_argument(call, message):
    """A wrong type, shape, dtype or device never reaches a kernel."""
    name, *given = call
    with pytest.raises(ValueError, match=message):
        getattr(elementwise, name)(*given)


def test_dtypes_may_be_mixed():
    """As under autocast: a residual in fp32, branches in bf16."""
    got = elementwise.gated_residual(x, y.bfloat16(), gate.bfloat16())
    torch.testing.assert_close(got, elementwise.gated_residual(x, y, gate), atol=5e-2, rtol=5e-2)


GRID, RULE = Grid(6, 6, block_m=16, block_n=16), choice.Rule()
CHOSEN = Symbols.dense(GRID, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("choose", x, Q, GRID, RULE), r"q must be \[B, 6, H, D\], got \[2, 6, 32\]"),
        (("choose", Q.double(), Q, GRID, RULE), "q must be a tensor of float32, .*float64"),
        (("choose", Q, Q[:, :5], GRID, RULE), r"k must be \[B, 6, H, D\], got \[2, 5, 2, 16\]"),
        (("choose", Q, Q[..., :8], GRID, RULE), r"k must be \[2, N, Hkv, 16\] with Hkv dividing 2"),
        (("choose", Q, Q.to("meta"), GRID, RULE), "k must be on cpu, got meta"),
        (("choose", Q, Q, (6, 6), RULE), "grid must be a Grid, got tuple"),
        (("choose", Q, Q, GRID, RULE, 0.5), "progress must be an fp32 scalar tensor, got 0.5"),
        (("choose", Q, Q, GRID, RULE, ONE), "progress must be an fp32 scalar tensor"),
        (("measure", None), "symbols must be Symbols, got NoneType"),
        (("measure", CHOSEN, 1.5), "min_skip must be a number from 0 to 1, got 1.5"),
        (("live_share", CHOSEN, 0, 0), "rows=0 from row_offset=0 on must be tokens of the 6"),
        (("live_share", CHOSEN, 5, 2), "rows=5 from row_offset=2 on must be tokens of the 6"),
    ],
    ids=lambda one: one if isinstance(one, str) else one[0],
)
def test_refusals_of_the_choice_name_the_argument(call, message):
    """The same for what chooses symbols."""
    name, *given = call
    with pytest.raises(ValueError, match=message):
        getattr(choice, name)(*given)
