"""What no op accepts is one sentence, the same from every backend: overlap, gradients, types."""

import pytest
import torch

from conftest import random_symbols
from flashomni.kernels import (
    ForecastTerms,
    gemm_o_update,
    sparse_attention,
    sparse_gemm_o,
    sparse_gemm_q,
)
from flashomni.kernels.common.overlap import overlap, overlaps_itself
from flashomni.symbols import Grid, Symbols

GRID = Grid(96, 96, block_m=32, block_n=32)
ROWS, HEADS, DIM, FEATURES = 96, 2, 16, 32
BACKENDS = ["reference", "cpu"]
everywhere = pytest.mark.parametrize("backend", BACKENDS)


def arguments(op):
    """Arguments that the op accepts."""
    symbols = random_symbols(GRID, 1, HEADS)
    heads = torch.randn(1, ROWS, HEADS, DIM)
    if op is sparse_attention:
        return {"q": heads, "k": heads.clone(), "v": heads.clone(), "symbols": symbols}
    if op is sparse_gemm_q:
        x, weight = torch.randn(1, ROWS, FEATURES), torch.randn(HEADS * DIM, FEATURES)
        return {"x": x, "weight": weight, "bias": torch.randn(HEADS * DIM), "symbols": symbols}
    rest = {"weight": torch.randn(FEATURES, HEADS * DIM), "bias": None, "symbols": symbols}
    if op is gemm_o_update:
        return {"terms": [heads, heads.clone()], **rest}
    return {
        "o": heads, "bias_terms": torch.randn(1, 1, ROWS, FEATURES),
        "coefficients": torch.ones(1), **rest,
    }  # fmt: skip


def out_of(op):
    heads = op in (sparse_attention, sparse_gemm_q)
    return torch.zeros(1, ROWS, HEADS, DIM) if heads else torch.zeros(1, ROWS, FEATURES)


OPS = [sparse_attention, sparse_gemm_q, sparse_gemm_o, gemm_o_update]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@each_op
@everywhere
def test_out_that_overlaps_an_input(op, backend):
    """Whole, in part, or as another view of the same memory."""
    given = arguments(op)
    name = {sparse_attention: "q", sparse_gemm_q: "x"}.get(op, "o")
    source = given["terms"][0] if op is gemm_o_update else given[name]
    memory = torch.zeros(source.numel() + 8)
    for start in (0, 8):
        given_here = memory[: source.numel()].view_as(source)
        out = memory[start : start + source.numel()].view_as(out_of(op))
        changed = {name: given_here}
        if op is gemm_o_update:
            name, changed = r"terms\[0\]", {"terms": [given_here, source]}
        with pytest.raises(ValueError, match=f"out must not overlap {name}"):
            op(**{**given, **changed}, out=out, backend=backend)


@each_op
@everywhere
def test_out_that_overlaps_itself(op, backend):
    """An expanded tensor has one place for many elements."""
    out = out_of(op)[:, :1].expand_as(out_of(op))
    with pytest.raises(ValueError, match="out must not overlap itself"):
        op(**arguments(op), out=out, backend=backend)


@everywhere
def test_lse_that_overlaps(backend):
    """Itself, or an output."""
    given = arguments(sparse_attention)
    out, lse = out_of(sparse_attention), torch.zeros(1, 1, ROWS).expand(1, HEADS, ROWS)
    with pytest.raises(ValueError, match="lse must not overlap itself"):
        sparse_attention(**given, lse=lse, backend=backend)
    lse = out.flatten()[: HEADS * ROWS].view(1, HEADS, ROWS)
    with pytest.raises(ValueError, match="lse must not overlap out"):
        sparse_attention(**given, out=out, lse=lse, backend=backend)


@everywhere
def test_outputs_of_an_update_that_overlap(backend):
    """``bias_terms`` that holds ``out``."""
    terms = torch.zeros(2, 1, ROWS, FEATURES)
    with pytest.raises(ValueError, match="bias_terms must not overlap out"):
        gemm_o_update(**arguments(gemm_o_update), out=terms[1], bias_terms=terms, backend=backend)


@everywhere
def test_interleaved_views_do_not_overlap(backend):
    """Out beside the queries in one fused tensor shares no element with them."""
    given = arguments(sparse_attention)
    fused = torch.randn(1, ROWS, 2, HEADS, DIM)
    given["q"], out = fused[:, :, 0], fused[:, :, 1]
    expected = sparse_attention(**{**given, "q": given["q"].clone()}, out=out.clone())
    got = sparse_attention(**given, out=out, backend=backend)
    torch.testing.assert_close(got, expected)


def test_overlap_is_that_of_the_elements():
    """Against the sets of addresses, for views of one memory."""
    memory = torch.zeros(64)
    views = [
        memory.as_strided(size, stride, start)
        for size in ((2, 3), (4, 2), (3, 1))
        for stride in ((3, 1), (1, 4), (5, 2), (0, 1), (2, 2), (8, 1))
        for start in (0, 1, 5, 9)
    ]
    numbers = torch.arange(64)
    places = [numbers.as_strided(v.shape, v.stride(), v.storage_offset()).flatten() for v in views]
    for x, at in zip(views, places, strict=True):
        if len(set(at.tolist())) < len(at):
            assert overlaps_itself(x)
        for y, there in zip(views, places, strict=True):
            assert overlap(x, y) == bool(set(at.tolist()) & set(there.tolist()))


@each_op
@everywhere
def test_gradients_are_refused(op, backend):
    """No op has a backward; under no_grad the same call runs."""
    given = arguments(op)
    given["weight" if "weight" in given else "k"].requires_grad_()
    with pytest.raises(ValueError, match="requires grad, but the ops have no backward"):
        op(**given, backend=backend)
    with torch.no_grad():
        op(**given, backend=backend)


@everywhere
def test_a_term_that_is_the_output_again_counts_once(backend):
    """Terms ``[o, o]`` is a position twice, not a tensor met again."""
    given = arguments(gemm_o_update)
    o = given.pop("terms")[0]
    twice, terms = gemm_o_update([o, o], **given, backend=backend)
    apart, expected = gemm_o_update([o, o.clone()], **given, backend="reference")
    torch.testing.assert_close(twice, apart, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_dense", [False, True])
@everywhere
def test_kv_len_is_clamped(backend, is_dense):
    """Below 0 there is no key, above N there are all of them; a row without keys is 0."""
    given = arguments(sparse_attention)
    if is_dense:
        given["symbols"] = None
    everything = {"out": torch.ones(1, ROWS, HEADS, DIM), "backend": backend}
    lse = torch.ones(1, HEADS, ROWS)
    for count, same in ((-5, 0), (-(2**31), 0), (ROWS + 9, ROWS)):
        got, expected = (
            sparse_attention(
                **{**given, **everything, "out": everything["out"].clone()},
                kv_len=torch.tensor([n], dtype=torch.int32), lse=lse.clone(),
            )
            for n in (count, same)
        )  # fmt: skip
        assert torch.equal(got, expected)


WRONG = [
    (sparse_attention, {"q": [1.0]}, "q must be a tensor, got list"),
    (sparse_attention, {"k": None}, "k must be a tensor, got None"),
    (sparse_attention, {"v": 3}, "v must be a tensor, got int"),
    (sparse_attention, {"kv_len": [96]}, "kv_len must be a tensor, got list"),
    (sparse_attention, {"symbols": torch.ones(1)}, "symbols must be Symbols, got Tensor"),
    (sparse_attention, {"softmax_scale": "0.1"}, "softmax_scale must be a number, got str"),
    (sparse_attention, {"softmax_scale": True}, "softmax_scale must be a number, got bool"),
    (sparse_attention, {"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    (sparse_attention, {"forecast": [1]}, "forecast must be ForecastTerms, got list"),
    (
        sparse_attention,
        {"forecast": ForecastTerms([torch.zeros(1, 9, HEADS, DIM)], torch.ones(1), 1.0)},
        "forecast.row_offset must be an int, got float",
    ),
    (sparse_attention, {"backend": ["cpu"]}, r"backend must be a name or None, got \['cpu'\]"),
    (sparse_gemm_q, {"weight": [[1.0]]}, "weight must be a tensor, got list"),
    (sparse_gemm_q, {"row_offset": 1.5}, "row_offset must be an int, got float"),
    (sparse_gemm_q, {"row_offset": False}, "row_offset must be an int, got bool"),
    (sparse_gemm_q, {"norm_eps": float("nan")}, "norm_eps must be finite, got nan"),
    (sparse_gemm_q, {"norm_eps": -1e-6}, "norm_eps must be at least 0, got -1e-06"),
    (sparse_gemm_q, {"norm_eps": "1e-6"}, "norm_eps must be a number, got str"),
    (sparse_gemm_q, {"rope": torch.ones(1)}, r"rope must be a pair \(cos, sin\), got Tensor"),
    (sparse_gemm_q, {"symbols": None}, "symbols must be Symbols, got NoneType"),
    (sparse_gemm_o, {"row_offset": "0"}, "row_offset must be an int, got str"),
    (sparse_gemm_o, {"coefficients": [1.0]}, "coefficients must be a tensor, got list"),
    (sparse_gemm_o, {"always": 1}, "always must be a tensor, got int"),
    (gemm_o_update, {"terms": torch.ones(2)}, "terms must be a list of tensors, got Tensor"),
    (gemm_o_update, {"terms": [1]}, "o must be a tensor, got int"),
    (gemm_o_update, {"row_offset": None}, "row_offset must be an int, got None"),
]


@pytest.mark.parametrize(
    ("op", "change", "message"), WRONG, ids=lambda x: getattr(x, "__name__", "")
)
@everywhere
def test_wrong_types_and_values(op, change, message, backend):
    """A ValueError that names the argument, what it got and takes."""
    with pytest.raises(ValueError, match=message):
        op(**{**arguments(op), "backend": backend, **change})


@everywhere
def test_empty_sizes(backend):
    """A head_dim of 0 and a sequence without tokens are refused; no rows are no work."""
    q = torch.zeros(1, ROWS, HEADS, 0)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        sparse_attention(q, q, q, backend=backend)
    with pytest.raises(ValueError, match="seqlen_q must be at least 1, got 0"):
        sparse_attention(*[torch.zeros(1, 0, HEADS, DIM)] * 3, backend=backend)
    symbols = Symbols.dense(GRID, 1, HEADS)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        sparse_gemm_q(torch.zeros(1, 9, 8), torch.zeros(0, 8), None, symbols, backend=backend)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        sparse_gemm_o(q, torch.zeros(8, 0), None, symbols, backend=backend)
    none = sparse_gemm_q(torch.zeros(1, 0, 8), torch.zeros(32, 8), None, symbols, backend=backend)
    assert none.shape == (1, 0, HEADS, DIM)
    batch = torch.zeros(0, ROWS, HEADS, DIM)
    assert sparse_attention(batch, batch, batch, backend=backend).shape == batch.shape
