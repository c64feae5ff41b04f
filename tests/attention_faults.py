"""What is wrong with a backend's answer to a case: called, replayed from a graph, compiled.

Of each call one vector of results leaves the device: a campaign on a GPU waits once a case.
"""

from dataclasses import dataclass, replace

import torch

from attention_cases import (
    PLAIN,
    POISON,
    Case,
    attend,
    exact_attention,
    make,
    token_masks,
    torch_attention,
    with_summaries,
)

REPEATS = 12


@dataclass(frozen=True)
class Verdict:
    """What is wrong, the error over the larger of torch's and half an ulp, tiles done again."""

    wrong: list[str]
    ratio: float
    redone: int


def verdict(case: Case, backend: str | None, device: torch.device, repeats: int) -> Verdict:
    """Run a case and compare."""
    x = make(case, device)
    rows, pairs = token_masks(case, x)
    redone = torch.zeros(4, dtype=torch.int32, device=device)
    results = []
    for index in range(repeats):
        out = torch.full_like(x.q, POISON)
        lse = torch.full(rows.shape, POISON, device=device) if case.has_lse else None
        attend(case, x, backend, out, lse, None if index else redone)
        results.append((out, lse))
    out, lse = results[0]
    whole, pairs, bias = with_summaries(case, x, pairs)
    exact, exact_lse = exact_attention(case, whole, pairs, bias)
    plain = torch_attention(case, whole, pairs, bias).float()
    live = rows.mT[..., None].expand_as(out)
    finite = exact.isfinite() & live
    zero = out.new_zeros((), dtype=torch.float32)

    def largest(y, where):
        return torch.where(where, y, zero).abs().amax().double()

    told = {
        "error": largest(out.float() - exact, finite),
        "torch's": largest(plain - exact, finite),
        "size": largest(exact, finite),
        "redone": redone[0].double(),
    }
    same_nan = (out.isnan() == exact.isnan()) | ~live
    empty = (rows & ~pairs.any(-1)).mT[..., None]
    wrong = {
        "NaN where there is none, or none where it is": ~same_nan,
        "an empty row is not zero": empty & (out != 0),
    }
    if x.forecast is None:
        wrong["a cached row of out changed"] = ~live & (out != POISON)
    else:
        wrong |= _forecast_faults(x.forecast, out, rows)
    if lse is not None:
        close = torch.isclose(lse, exact_lse, atol=2e-3, rtol=1e-3, equal_nan=True)
        wrong["lse is off"] = ~close & rows
        wrong["a cached row of lse changed"] = ~rows & (lse != POISON)
    for other_out, other_lse in results[1:]:
        differs = ~_same(out, other_out)
        wrong["repeats differ"] = wrong.get("repeats differ", False) | differs.any()
        if lse is not None:
            wrong["repeats differ"] |= (~_same(lse, other_lse)).any()
    told |= {name: where.any().double() for name, where in wrong.items()}
    told = dict(zip(told, torch.stack(list(told.values())).tolist(), strict=True))
    found = [name for name in wrong if told[name]]
    # torch may hit the exact value by luck: what rounding the largest output costs is allowed.
    floor = torch.finfo(case.dtype).eps / 2 * told["size"]
    limit = 2 * told["torch's"] + floor
    if not told["error"] <= limit:
        found.append(f"out is off by {told['error']:.2e}, allowed {limit:.2e}")
    ratio = told["error"] / max(told["torch's"], floor, 1e-300)
    return Verdict(found, ratio, int(told["redone"]))


def _same(a, b):
    return (a == b) | (a.isnan() & b.isnan())


def _forecast_faults(forecast, out, rows):
    """Cached rows against the sum in fp64, rounded once; those outside must be untouched."""
    start, count = forecast.row_offset, forecast.terms[0].shape[1]
    products = [
        weight * term.double()
        for weight, term in zip(forecast.coefficients.double(), forecast.terms, strict=False)
    ]
    exact, size = sum(products), sum(product.abs() for product in products)
    once = torch.finfo(out.dtype).eps / 2 * exact.abs() + torch.finfo(out.dtype).tiny
    limit = 1.01 * once + 4 * torch.finfo(torch.float32).eps * size
    cached = ~rows.mT  # [B, M, H]
    outside = cached.clone()
    outside[:, start : start + count] = False
    error = (out[:, start : start + count].double() - exact).abs()
    return {
        "a forecast is off": ~(error <= limit) & cached[:, start : start + count, :, None],
        "a cached row outside of the forecast changed": outside[..., None] & (out != POISON),
    }


def _outputs(case, x):
    """Poisoned ``out`` and ``lse``: the same kernels as in the other checks of the case."""
    batch, seqlen_q, _, heads, _, _ = case.shape
    lse = torch.full((batch, heads, seqlen_q), POISON, device=x.q.device)
    return torch.full_like(x.q, POISON), lse if case.has_lse else None


def _agree(first, second):
    return all(bool(_same(a, b).all()) for a, b in zip(first, second, strict=True) if a is not None)


def _values(x):
    """The tensors that depend on the kind of a case."""
    more = () if x.summary is None else (x.summary.k, x.summary.v, x.summary.log_n)
    return x.q, x.k, x.v, *more


def graph_faults(case: Case, backend: str | None, device: torch.device) -> list[str]:
    """A graph captured on plain values, replayed on some that overflow, and on plain ones."""
    x = make(case, device, PLAIN)
    outputs = _outputs(case, x)
    attend(case, x, backend, *outputs)  # builds
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(case, x, backend, *outputs)
    found = []
    for kind in (("sink last", 400.0), ("rise", 400.0), ("fall", 400.0), PLAIN):
        other = make(case, device, kind)
        for mine, theirs in zip(_values(x), _values(other), strict=True):
            mine.copy_(theirs)
        want = _outputs(case, x)
        attend(case, x, backend, *want)
        for tensor in outputs:
            if tensor is not None:
                tensor.fill_(POISON)
        graph.replay()
        if not _agree(outputs, want):
            found.append(f"a replay on {kind} differs from a call")
    return found


def compile_faults(case: Case, backend: str | None, device: torch.device) -> list[str]:
    """Under ``torch.compile``: the same bits."""
    x = make(case, device)
    want = _outputs(case, x)
    attend(case, x, backend, *want)

    def run(q, k, v, out, lse):
        own = out.clone(), None if lse is None else lse.clone()
        attend(case, replace(x, q=q, k=k, v=v), backend, *own)
        return own

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = compiled(x.q, x.k, x.v, *_outputs(case, x))
    return [] if _agree(got, want) else ["the compiled call differs"]
