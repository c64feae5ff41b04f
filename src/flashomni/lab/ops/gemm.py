"""Problems of the projections: before attention and behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.dispatch import backends
from flashomni.kernels import gemm_o_update, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.common.rope import pack_rope
from flashomni.lab.ops.problem import Baseline, Problem, Request, relative
from flashomni.lab.ops.shapes import exact_symbols
from flashomni.symbols import Grid

# cuBLAS without any bias, and with a whole term added: the work of GEMM-O with one bias term.
NO_BIAS, ADDMM = "cuBLAS, no bias", "cuBLAS, addmm(beta=1)"
APART = "ours, then compiled norm and RoPE"
INTERVAL = 6  # Dispatch steps after an Update, as in the paper


class _Layer:
    """One projection with what surrounds it, on one of several sets of inputs."""

    def __init__(self, request: Request) -> None:
        shape, width = request.shape, request.shape.width
        self.request, self.sets = request, request.sets
        self.grid = Grid(shape.seqlen, shape.seqlen)
        symbols = exact_symbols(self.grid, shape.num_heads, request.density, 1.0)
        self.symbols = symbols.to(request.device)
        self.density = round(symbols.q_mask().float().mean().item(), 4)
        self.x = request.many(1, shape.seqlen, width)
        self.weight, self.bias = request.randn(width, width) / width**0.5, request.randn(width)
        self.y = [torch.zeros_like(x) for x in self.x]

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.request.shape.num_heads, -1))

    def dense(self, i: int) -> Tensor:
        return torch.nn.functional.linear(self.x[i], self.weight, self.bias)

    def linear(self, ideal: float) -> dict[str, Baseline]:
        name = "cuBLAS" if self.request.device.type == "cuda" else "torch linear"
        return {name: Baseline(self.dense, ideal)}

    def without_bias(self, ideal: float) -> dict[str, Baseline]:
        return {NO_BIAS: Baseline(lambda i: torch.mm(self.x[i][0], self.weight.T), ideal)}

    def backend(self, op: str) -> str:
        if self.request.backend is not None:
            return self.request.backend
        names = backends(op)
        return names[0] if self.request.device.type == "cuda" else "cpu"


def gemm_q(request: Request) -> Problem:
    """The projection alone."""
    return _gemm_q(_Layer(request), {})


def gemm_q_fused(request: Request) -> Problem:
    """With RMSNorm and RoPE, against the projection without them and against ours without them.

    The last baseline is ours, then norm and RoPE compiled by torch.
    """
    layer, shape = _Layer(request), request.shape
    angle = torch.rand(shape.seqlen, shape.head_dim // 2, device=request.device) * 6
    rope = pack_rope(angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1))
    norm = request.randn(shape.head_dim).abs() + 0.5
    fused = {"norm_weight": norm, "norm_eps": 1e-6, "rope": rope}
    problem = _gemm_q(layer, fused)
    plain = _gemm_q(layer, {})
    if request.device.type != "cuda":
        return problem

    def norm_and_rope(q: Tensor) -> Tensor:
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], norm, 1e-6)
        a, b = q.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rope[0][:, None], rope[1][:, None]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
        return turned.flatten(-2).to(q.dtype)

    if request.wants(APART):
        compiled = torch.compile(norm_and_rope, dynamic=False)
        problem.baselines[APART] = Baseline(lambda i: compiled(plain.ours(i)), 1.0)
    return problem


def _gemm_q(layer: _Layer, options: dict) -> Problem:
    name = layer.backend("gemm_q")

    def run(i: int, backend: str = name, out: Tensor | None = None) -> Tensor:
        out = layer.heads(layer.y[i]) if out is None else out
        return sparse_gemm_q(
            layer.x[i], layer.weight, layer.bias, layer.symbols, out=out, backend=backend, **options
        )

    def error() -> float:
        exact = run(0, "reference", torch.zeros_like(layer.heads(layer.y[0])))
        layer.y[0].zero_()
        return relative(run(0), exact)

    ideal = layer.linear(1 / layer.density)
    if layer.request.device.type == "cuda":
        ideal |= layer.without_bias(1 / layer.density)
    return Problem(name, layer.density, run, layer.sets, ideal, check=error)


def gemm_o(request: Request) -> Problem:
    """A Dispatch step with one bias term."""
    layer = _Layer(request)
    terms, coefficients = _terms(layer), torch.ones(1, device=request.device)
    name = layer.backend("gemm_o")

    def run(i: int, backend: str = name) -> Tensor:
        return sparse_gemm_o(
            layer.heads(layer.x[i]),
            layer.weight,
            layer.bias,
            layer.symbols,
            terms[i],
            coefficients,
            out=layer.y[i],
            backend=backend,
        )

    def error() -> float:
        exact = run(0, "reference").clone()
        return relative(run(0), exact)

    ideal = layer.linear(1 / layer.density)
    if layer.request.device.type == "cuda":
        ideal |= layer.without_bias(1 / layer.density)

        def same_work(i: int) -> Tensor:
            return torch.addmm(terms[i][0, 0], layer.x[i][0], layer.weight.T)

        ideal[ADDMM] = Baseline(same_work, 1 / layer.density)
    return Problem(name, layer.density, run, layer.sets, ideal, check=error)


def gemm_o_interval(request: Request) -> Problem:
    """One Update and ``INTERVAL`` Dispatch steps, one bias term; (P + 1) / (1 + P d) is ideal."""
    layer = _Layer(request)
    terms = _terms(layer)
    dispatch = gemm_o(request)
    name = layer.backend("gemm_o_update")

    def run(i: int) -> None:
        gemm_o_update(
            [layer.heads(layer.x[i])],
            layer.weight,
            layer.bias,
            layer.symbols,
            out=layer.y[i],
            bias_terms=terms[i],
            backend=name,
        )
        for j in range(INTERVAL):
            dispatch.ours((i + j) % layer.sets)

    def dense(i: int) -> None:
        for j in range(INTERVAL + 1):
            layer.dense((i + j) % layer.sets)

    bound = (INTERVAL + 1) / (1 + INTERVAL * layer.density)
    label = next(iter(layer.linear(1.0)))
    return Problem(name, layer.density, run, layer.sets, {label: Baseline(dense, bound)})


def _terms(layer: _Layer) -> list[Tensor]:
    return [torch.randn_like(x)[None] for x in layer.x]
