"""Problems of attention: sparse, cached, both; what symbols cost, and doing tiles again."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flashomni.kernels import select, sparse_attention
from flashomni.kernels.attention.op import AttentionCall
from flashomni.lab.ops import baselines
from flashomni.lab.ops.problem import Baseline, Problem, Request, relative
from flashomni.lab.ops.shapes import exact_symbols
from flashomni.lab.ops.timing import Run
from flashomni.symbols import Grid, Symbols, q_bytes

CHECKED_ROWS = 2048  # whole bytes of S_c
CHECKED_HEADS = 4
FA4_LISTS, FLEX = "FA4, its block lists", "FlexAttention, same blocks"
HILL = 200.0  # nats from the first and the last key up to the middle one


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
        makers |= {"cuDNN sdpa": baselines.cudnn_sdpa, "FA4": baselines.flash_attention_4}
    found: dict[str, Baseline] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        if request.wants(name):
            dense = make()
            if dense is None:
                missing[name] = "not installed"
            else:
                found[name] = Baseline(call.with_inputs(dense), 1 / call.density)
    if request.device.type == "cuda" and call.symbols is not None:
        if request.wants(FA4_LISTS):
            _with_lists(call, symbols, found, missing)
        if request.wants(FLEX):
            flex = baselines.flex_attention(symbols)
            found[FLEX] = Baseline(call.with_inputs(flex), 1.0)
    return Problem(call.backend, call.density, call, request.sets, found, missing, call.error)


def _with_lists(
    call: _AttentionCalls,
    symbols: Symbols,
    found: dict[str, Baseline],
    missing: dict[str, str],
) -> None:
    """FA4 through its own block lists; wrong results are never timed."""
    lists = baselines.flash_attention_4_lists(symbols)
    if lists is None:
        missing[FA4_LISTS] = "not installed"
        return
    run = call.with_inputs(lists)

    def error() -> float:
        computed = symbols.q_mask().repeat_interleave(symbols.grid.block_m, -1).mT
        computed = computed[:, : call.out.shape[1], :, None]
        ours, theirs = call(0).clone(), run(0)
        return relative(theirs.where(computed, 0), ours.where(computed, 0))

    found[FA4_LISTS] = Baseline(run, 1.0, error)


def attention_redone(request: Request) -> Problem:
    """Every tile done again, against the same dense call on plain values.

    Scores rise by 200 nats from both ends to the middle: wherever a tile begins, its reference is
    far too low. ``density`` is that of S_s when it is below 1.
    """
    symbols, shape = None, request.shape
    if request.density < 1:
        grid = Grid(shape.seqlen, shape.seqlen)
        symbols = exact_symbols(grid, shape.num_heads, 1.0, request.density).to(request.device)
    call, plain = (_AttentionCalls(request, symbols) for _ in range(2))
    away = torch.linspace(-1, 1, shape.seqlen, device=request.device).abs()
    along = torch.zeros(shape.head_dim, device=request.device)
    along[0] = 1.0
    for q, k, _ in call.inputs:
        q.mul_(0.3).add_(8 * along)
        hill = (1 - away[:, None, None]) * (HILL / 8 * shape.head_dim**0.5) * along
        k.mul_(0.3).add_(hill)
    own = {"nothing done again": Baseline(plain, 1.0)}

    def error() -> float:
        """Without what rounding such scores to fp32 costs each weight."""
        return max(call.error() - HILL * torch.finfo(torch.float32).eps, 0.0)

    return Problem(call.backend, call.density, call, request.sets, own, check=error)


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
        return relative(self.out[:, :rows, head], exact)
