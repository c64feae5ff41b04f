"""The problems: our call, its definition to check against, and the baselines with their ideals.

The ideal is the ratio to the baseline if time fell with the work: 1 / density against something
dense, 1 against something that skips the same blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashomni.dispatch import backends
from flashomni.kernels import (
    gemm_o_update,
    select,
    sparse_attention,
    sparse_gemm_o,
    sparse_gemm_q,
)
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common.rope import pack_rope
from flashomni.lab.ops import baselines
from flashomni.lab.ops.shapes import Shape, exact_symbols
from flashomni.lab.ops.timing import Run
from flashomni.policies import AttentionSite, make_policy
from flashomni.symbols import Grid, Symbols, q_bytes

INTERVAL = 6  # Dispatch steps after an Update, as in the paper
CHECKED_ROWS = 2048  # of an attention; whole bytes of S_c
CHECKED_HEADS = 4


@dataclass(frozen=True)
class Baseline:
    """Something to compare with, and the ratio that would be linear."""

    run: Run
    ideal: float


@dataclass(frozen=True)
class Problem:
    """What to time.

    Args:
        backend: that runs ours.
        density: share of the work that is left.
        ours: the call.
        sets: how many sets of inputs the runs take in turn.
        baselines: by name.
        missing: baselines that cannot run here, and why.
        check: relative error of ours against the definition; ``None`` where another problem
            checks the same op.
    """

    backend: str
    density: float
    ours: Run
    sets: int
    baselines: dict[str, Baseline]
    missing: dict[str, str] = field(default_factory=dict)
    check: Callable[[], float] | None = None


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    shape: Shape
    density: float
    device: torch.device
    dtype: torch.dtype
    backend: str | None = None

    @property
    def sets(self) -> int:
        """Enough that they do not all stay in the L2 cache of a GPU."""
        return 4 if self.device.type == "cuda" and self.shape.seqlen < 8192 else 1

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def many(self, *shape: int) -> list[Tensor]:
        return [self.randn(*shape) for _ in range(self.sets)]


# ---------------------------------------------------------------- attention


def attention(request: Request) -> Problem:
    """Every query block computed, key blocks skipped."""
    return _attention(request, 1.0, request.density)


def attention_cached(request: Request) -> Problem:
    """Query blocks cached, the others visit everything."""
    return _attention(request, request.density, 1.0)


def attention_both(request: Request) -> Problem:
    """Query blocks cached and key blocks skipped, the same share of each."""
    return _attention(request, math.sqrt(request.density), math.sqrt(request.density))


def decode(request: Request) -> Problem:
    """What symbols cost: all-ones ones against the same kernel without symbols.

    ``density`` is that of S_s when it is below 1; the ideal is then 1 / density.
    """
    shape = request.shape
    grid = Grid(shape.seqlen, shape.seqlen)
    symbols = Symbols.dense(grid, 1, shape.num_heads, request.device)
    if request.density < 1:
        symbols = exact_symbols(grid, shape.num_heads, 1.0, request.density).to(request.device)
    call = _AttentionCalls(request, symbols)
    plain = _AttentionCalls(request, None, call)
    own = {"no symbols": Baseline(plain, 1 / call.density)}
    return Problem(call.backend, call.density, call, request.sets, own, check=call.error)


def _attention(request: Request, q_density: float, kv_density: float) -> Problem:
    shape = request.shape
    grid = Grid(shape.seqlen, shape.seqlen)
    symbols = exact_symbols(grid, shape.num_heads, q_density, kv_density).to(request.device)
    # Dense attention is called as such; `decode` tells what symbols of ones would cost.
    call = _AttentionCalls(request, None if q_density == kv_density == 1 else symbols)
    makers: dict[str, Callable[[], baselines.Attention | None]]
    makers = {"torch sdpa": baselines.torch_sdpa}
    if request.device.type == "cuda":
        makers = {"cuDNN sdpa": baselines.cudnn_sdpa, "FA4": baselines.flash_attention_4}
    found: dict[str, Baseline] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        dense = make()
        if dense is None:
            missing[name] = "not installed"
        else:
            found[name] = Baseline(call.with_inputs(dense), 1 / call.density)
    if request.device.type == "cuda":
        flex = baselines.flex_attention(symbols)
        found["FlexAttention, same blocks"] = Baseline(call.with_inputs(flex), 1.0)
    return Problem(call.backend, call.density, call, request.sets, found, missing, call.error)


class _AttentionCalls:
    """Our call on one of several sets of inputs."""

    def __init__(
        self, request: Request, symbols: Symbols | None, like: _AttentionCalls | None = None
    ) -> None:
        shape = request.shape
        size = (1, shape.seqlen, shape.num_heads, shape.head_dim)
        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = [] if like is None else like.inputs
        while len(self.inputs) < request.sets:
            self.inputs.append((request.randn(*size), request.randn(*size), request.randn(*size)))
        self.out = torch.zeros_like(self.inputs[0][0])
        self.symbols, self.name = symbols, request.backend
        q, k, v = self.inputs[0]
        call = AttentionCall(q, k, v, self.out, None, symbols, None, shape.head_dim**-0.5)
        self.backend = select("attention", call, request.backend).name
        self.density = 1.0
        if symbols is not None:
            self.density = round(symbols.density().item(), 4)

    def __call__(self, i: int) -> Tensor:
        q, k, v = self.inputs[i]
        return sparse_attention(q, k, v, self.symbols, out=self.out, backend=self.backend)

    def with_inputs(self, run: baselines.Attention) -> Run:
        return lambda i: run(*self.inputs[i])

    def error(self) -> float:
        """Of the first rows of a few heads: the definition of all would not fit."""
        q, k, v = self.inputs[0]
        self(0)
        head = slice(0, min(q.shape[2], CHECKED_HEADS))
        rows = min(q.shape[1], CHECKED_ROWS)
        part = None
        if self.symbols is not None:
            bits, blocks = self.symbols, -(-rows // self.symbols.grid.block_m)
            grid = Grid(rows, k.shape[1])
            q_bits = bits.q_bits[:, head, : q_bytes(blocks)]
            part = Symbols(q_bits, bits.kv_bits[:, head, :blocks], grid)
        q, k, v = q[:, :rows, head].float(), k[:, :, head].float(), v[:, :, head].float()
        exact = torch.zeros_like(q)
        sparse_attention(q, k, v, part, out=exact, backend="reference")
        return _relative(self.out[:, :rows, head], exact)


# ---------------------------------------------------------------- projections


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

    compiled = torch.compile(norm_and_rope, dynamic=False)
    apart = Baseline(lambda i: compiled(plain.ours(i)), 1.0)
    problem.baselines["ours, then compiled norm and RoPE"] = apart
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
        return _relative(run(0), exact)

    ideal = layer.linear(1 / layer.density)
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
        return _relative(run(0), exact)

    ideal = layer.linear(1 / layer.density)
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


# ---------------------------------------------------------------- symbols


def symbols(request: Request) -> Problem:
    """Choosing the symbols of a layer against dense attention; a ratio of 1 / 0.03 is asked for.

    By the policy ``flashomni``, or where there is no text ``spargeattn``; ``density`` is the share
    of attention mass that is kept.
    """
    shape = request.shape
    size = (1, shape.seqlen, shape.num_heads, shape.head_dim)
    inputs = [(request.randn(*size), request.randn(*size)) for _ in range(request.sets)]
    grid = Grid(shape.seqlen, shape.seqlen, shape.text)
    if shape.text[1] > shape.text[0]:
        left_out = 1 - request.density
        policy = make_policy("flashomni", tau_q=left_out, tau_kv=left_out)
    else:
        policy = make_policy("spargeattn", mass=request.density)
    progress = torch.ones((), device=request.device)
    values = request.randn(*size)
    dense = baselines.torch_sdpa()
    if request.device.type == "cuda":
        dense = baselines.cudnn_sdpa() or dense
    where = "device" if request.device.type == "cuda" else "cpu"
    return Problem(
        where,
        request.density,
        lambda i: policy(AttentionSite.alone(*inputs[i], grid, progress)),
        request.sets,
        {"dense attention": Baseline(lambda i: dense(*inputs[i], values), 1 / 0.03)},
    )


PROBLEMS: dict[str, Callable[[Request], Problem]] = {
    "attention": attention,
    "attention_cached": attention_cached,
    "attention_both": attention_both,
    "decode": decode,
    "gemm_q": gemm_q,
    "gemm_q_fused": gemm_q_fused,
    "gemm_o": gemm_o,
    "gemm_o_interval": gemm_o_interval,
    "symbols": symbols,
}


def _relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm; NaN, which no limit lets pass, if nothing was computed."""
    return ((got.float() - exact.float()).norm() / exact.float().norm()).item()
