"""Runs configurations of the portable kernels on a GPU: is one right, and how fast is it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import configs
from flashomni.kernels.common.configs import Config
from flashomni.kernels.common.rope import apply_rope
from flashomni.kernels.gemm_q.op import GemmQCall
from flashomni.kernels.summarise.op import summarise
from flashomni.lab.ops.shapes import exact_symbols
from flashomni.lab.ops.tiles import Task
from flashomni.lab.ops.timing import interleaved
from flashomni.symbols import Grid, Symbols

WIDTH = 3072  # features of a token; heads are as many as fit
TIMED, CHECKED = 4608, 1037  # tokens; what is checked is ragged
DENSITIES = {"attention": (1.0, 0.3), "gemm_q": (1.0, 0.5), "gemm_o": (1.0, 0.5)}
CHECK_DENSITY = 0.6
ROUNDS = 5
SETS = 2  # of inputs, in turn
EXTRA = 1000  # features of no head, ragged
POISON = 7.0
Launch = Callable[[Config], None]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    told = torch.cuda.get_device_properties(device)
    for name in ("shared_memory_per_block_optin", "shared_memory_per_block"):
        if getattr(told, name, 0):
            return int(getattr(told, name))
    return 64 << 10


@dataclass(frozen=True)
class Problem:
    """A call of one kernel.

    Args:
        launch: runs it with a configuration.
        out: what it writes, in place.
        written: where it must, in the shape of ``out``; elsewhere it may not.
        define: the same by torch, in the dtype that is given.
        variants: other calls that need more of a program's registers or memory, by name.
    """

    launch: Launch
    out: Tensor
    written: Tensor
    define: Callable[[torch.dtype], Tensor]
    variants: Mapping[str, Launch]


class GpuBench:
    """See :class:`flashomni.lab.ops.tiles.Bench`.

    Args:
        device: where.
        dtype: of the elements.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._task: Task | None = None

    def shipped(self, task: Task) -> Config:
        return configs.tiles(task.table, configs.places(self.device), task.head_dim, task.num_bytes)

    def wrong(self, task: Task, config: Config) -> str | None:
        self._prepare(task)
        self._checked.out.fill_(POISON)
        why = self._stopped(self._checked.launch, config)
        return why or self._bound.broken_by(self._checked)

    def refused(self, task: Task, config: Config) -> str | None:
        self._prepare(task)
        for name, launch in self._checked.variants.items():
            why = self._stopped(launch, config)
            if why is not None:
                return f"{name} {why}"
        return None

    def times(self, task: Task, configs: Sequence[Config]) -> list[tuple[float, ...]]:
        self._prepare(task)
        columns = []
        for density in DENSITIES[task.op]:
            sets = [
                problem(task, TIMED, density, self.device, self.dtype, seed) for seed in range(SETS)
            ]
            runs = {
                str(number): lambda i, sets=sets, config=config: sets[i].launch(config)
                for number, config in enumerate(configs)
            }
            ms = interleaved(runs, self.device, ROUNDS, SETS)
            columns.append([ms[str(number)] for number in range(len(configs))])
        return list(zip(*columns, strict=True))

    def _stopped(self, launch: Launch, config: Config) -> str | None:
        try:
            launch(config)
            self._synchronize()
        except Exception as error:  # Triton's have no common class with those of its passes
            self._synchronize()  # an error that the device does not survive ends it all
            first = (str(error).strip() or repr(error)).splitlines()[0]
            return f"it does not run: {first[:100]}"
        return None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _prepare(self, task: Task) -> None:
        if task != self._task:
            self._checked = problem(task, CHECKED, CHECK_DENSITY, self.device, self.dtype, 0)
            self._bound = Bound.of(self._checked, self.dtype)
            self._task = task


@dataclass(frozen=True)
class Bound:
    """Twice the error that torch has in the same dtype."""

    exact: Tensor
    largest: float
    norm: float

    @classmethod
    def of(cls, problem: Problem, dtype: torch.dtype) -> Bound:
        exact = problem.define(torch.float64)[problem.written]
        error = problem.define(dtype)[problem.written].double() - exact
        floor = torch.finfo(dtype).eps * exact.abs().max().item()  # one rounding of the largest
        return cls(exact, 2 * error.abs().max().item() + floor, 2 * error.norm().item())

    def broken_by(self, problem: Problem) -> str | None:
        """What is wrong with what the problem's ``out`` holds."""
        if not (problem.out[~problem.written] == POISON).all():
            return "it writes tiles that are cached"
        error = problem.out[problem.written].double() - self.exact
        largest, norm = error.abs().max().item(), error.norm().item()
        if largest <= self.largest and norm <= self.norm:  # false for NaN
            return None
        return (
            f"its error is {largest:.3g} at most and {norm:.3g} in all, "
            f"allowed are {self.largest:.3g} and {self.norm:.3g}"
        )


def problem(
    task: Task, seqlen: int, density: float, device: torch.device, dtype: torch.dtype, seed: int
) -> Problem:
    """A random problem of an op, with ``WIDTH`` features.

    Args:
        task: the op and its head_dim.
        seqlen: tokens.
        density: share of what is visited, in attention, or computed.
        device: where.
        dtype: of the elements.
        seed: of the values.
    """
    heads, dim = max(WIDTH // task.head_dim, 1), task.head_dim
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    grid = Grid(seqlen, seqlen)
    make = {"attention": _attention, "gemm_q": _gemm_q, "gemm_o": _gemm_o}[task.op]
    share = (1.0, density) if task.op == "attention" else (density, 1.0)
    symbols = exact_symbols(grid, heads, *share, seed).to(device)
    return make(seqlen, heads, dim, symbols, randn)


def _rows(mask: Tensor, seqlen: int, block_m: int) -> Tensor:
    """``[B, H, Mb]`` of blocks as ``[B, S, H]`` of tokens."""
    return mask.repeat_interleave(block_m, -1)[..., :seqlen].mT


def _attention(
    seqlen: int, heads: int, dim: int, symbols: Symbols, randn: Callable[..., Tensor]
) -> Problem:
    from flashomni.kernels.attention import portable

    q, k, v = (randn(1, seqlen, heads, dim) for _ in range(3))
    call = AttentionCall(q, k, v, torch.empty_like(q), None, symbols, None, dim**-0.5)
    block_m, block_n = symbols.grid.block_m, symbols.grid.block_n

    def define(dtype: torch.dtype) -> Tensor:
        visits = symbols.kv_mask().repeat_interleave(block_m, 2)[:, :, :seqlen]
        visits = visits.repeat_interleave(block_n, 3)[..., :seqlen]
        query, key, value = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(query, key, value, attn_mask=visits).transpose(1, 2)

    out = torch.empty_like(q)
    lse = torch.empty(1, heads, seqlen, device=q.device)
    kv_len = torch.full((1,), seqlen, dtype=torch.int32, device=q.device)
    others = {
        "without symbols": replace(call, out=out, symbols=None),
        "with lse and kv_len": replace(call, out=out, lse=lse, kv_len=kv_len),
        "with a summary": replace(call, out=out, summary=summarise(k, v, symbols.grid)),
    }
    variants = {name: partial(portable.launch, other) for name, other in others.items()}
    written = torch.ones_like(q, dtype=torch.bool)
    return Problem(partial(portable.launch, call), call.out, written, define, variants)


def _gemm_q(
    seqlen: int, heads: int, dim: int, symbols: Symbols, randn: Callable[..., Tensor]
) -> Problem:
    from flashomni.kernels.gemm_q import portable

    width = heads * dim
    x, weight, bias = randn(1, seqlen, width), randn(width, width) / width**0.5, randn(width)
    norm = randn(dim).abs() + 0.5
    angle = randn(seqlen, dim // 2).float()
    rope = (angle.cos(), angle.sin())
    out = torch.empty_like(x).unflatten(2, (heads, dim))
    call = GemmQCall(x, weight, bias, out, symbols, 0, norm, 1e-6, rope, "interleaved")

    def define(dtype: torch.dtype) -> Tensor:
        y = linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).unflatten(2, (heads, dim))
        return apply_rope(rms_norm(y, (dim,), norm.to(dtype), 1e-6), *rope)

    rows = _rows(symbols.q_mask(), seqlen, symbols.grid.block_m)
    written = rows[..., None].expand_as(out)
    half = replace(call, out=torch.empty_like(out), rope_layout="half")
    variants = {"with the half layout": partial(portable.launch, half)}
    return Problem(partial(portable.launch, call), out, written, define, variants)


def _gemm_o(
    seqlen: int, heads: int, dim: int, symbols: Symbols, randn: Callable[..., Tensor]
) -> Problem:
    from flashomni.kernels.gemm_o import portable

    width = heads * dim
    o = randn(1, seqlen, heads, dim)
    weight, bias = randn(width, width) / width**0.5, randn(width)
    terms, coefficients = randn(1, 1, seqlen, width), torch.ones(1, device=o.device)
    out = torch.empty_like(o).flatten(2)

    wide = torch.cat([weight, randn(width, EXTRA)], 1)
    extra, other = randn(1, seqlen, EXTRA), torch.empty_like(out)

    def launch(config: Config) -> None:
        portable.launch(
            o, weight, bias, None, terms, coefficients, None, out, symbols, 0, config, cached=False
        )

    def update(config: Config) -> None:
        portable.launch(
            o, wide, bias, extra, None, None, terms[0], other, symbols, 0, config, cached=True
        )

    def define(dtype: torch.dtype) -> Tensor:
        rows = _rows(symbols.q_mask(), seqlen, symbols.grid.block_m)
        kept = torch.where(rows[..., None], o, 0).flatten(2)
        return linear(kept.to(dtype), weight.to(dtype), bias.to(dtype)) + terms[0].to(dtype)

    written = torch.ones_like(out, dtype=torch.bool)
    return Problem(launch, out, written, define, {"in an Update": update})
