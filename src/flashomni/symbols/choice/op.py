"""Choosing symbols on the pooled attention map, and what they amount to: contracts.

Three ops. ``reference`` and ``cpu`` are the definitions in torch (``_definition.py``); ``portable``
does the same in few Triton launches and serves ``sm90`` too. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, not_on, register
from flashomni.flatten import see_as
from flashomni.symbols.choice import _definition
from flashomni.symbols.choice._checks import (
    check_choose,
    check_min_skip,
    check_rows,
    check_scale,
    check_symbols,
)
from flashomni.symbols.choice._definition import heaviest, low_mass, pool, pooled_map
from flashomni.symbols.choice._fine import fine_map
from flashomni.symbols.grid import Grid
from flashomni.symbols.symbols import Symbols

__all__ = [
    "ChooseCall", "LiveCall", "MeasureCall", "Rule", "choose", "fine_map", "heaviest", "live_share",
    "low_mass", "measure", "pool", "pooled_map",
]  # fmt: skip

VISIT = ("all", "mass", "count")
COMPUTE = ("all", "count", "and", "mean", "c", "g")
RESOLUTIONS = (0, 8, 16, 32)


@dataclass(frozen=True)
class Rule:
    """What is chosen on the pooled map P ``[B, H, Mb, Nb]`` (:func:`pooled_map`).

    With a resolution P is :func:`fine_map`: the map of means of so few tokens, summed over the
    parts of a block pair. It finds what is alike within a block only in part.

    C of a vision block is what text rows of P give to it; G is the softmax over vision rows of the
    text columns of P, summed over these (arXiv 2509.25401, 3.5). Without text in the sequence C is
    what all rows give, and G is of the columns of a guide. A test on a mass leaves out what
    :func:`low_mass` names. Text queries are computed whatever the rule says, and no row is empty.

    Args:
        visit: S_s. ``all``; ``mass``: a test on each row of P; ``count``: the ``count_kv`` heaviest
            of each row, text above everything.
        compute: S_c. ``all``; ``count``: the ``count_q`` blocks with the largest column sums, text
            above everything; ``and``: what is heavy in C or in G; ``mean``: one test on the mean of
            their shares; ``c``, ``g``: one test on one of them.
        tau_q: share of the mass that the tests of S_c leave out when progress is 1.
        tau_kv: the same of S_s.
        power: both grow with ``progress ** power``; 0 is constant.
        count_q: query blocks to compute.
        count_kv: key blocks to visit in each row.
        share_heads: one S_c for all heads, from the sum over heads (before the gate).
        gate: blocks whose tokens have a mean cosine below this are computed and visited, and take
            no part in tests on rows of P (SpargeAttn, arXiv 2502.18137); ``None`` gates nothing.
        center_k: subtract the mean key before the scores: the same map but for rounding.
        text_rows: text rows visit everything.
        text_columns: every row visits the text keys.
        diagonal: every row visits the blocks that hold its own tokens, beside what else it visits.
        resolution: 8, 16 or 32 tokens whose means make P, a divisor of both blocks; 0 takes whole
            blocks. Means are rounded to fp16, and ``center_k`` changes nothing.

    Raises:
        ValueError: ``visit``, ``compute`` or ``resolution`` is none of these.
    """

    visit: str = "all"
    compute: str = "all"
    tau_q: float = 0.0
    tau_kv: float = 0.0
    power: float = 0.0
    count_q: int = 0
    count_kv: int = 0
    share_heads: bool = False
    gate: float | None = None
    center_k: bool = False
    text_rows: bool = False
    text_columns: bool = True
    diagonal: bool = False
    resolution: int = 0

    def __post_init__(self) -> None:
        named = {"visit": VISIT, "compute": COMPUTE, "resolution": RESOLUTIONS}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, "
                    f"got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class ChooseCall:
    """What a backend of ``choose`` gets; it returns new q_bits and kv_bits, every rule kept."""

    q: Tensor
    k: Tensor
    grid: Grid
    rule: Rule
    progress: Tensor | None
    guide: Tensor | None = None
    softmax_scale: float | None = None

    @property
    def scale(self) -> float:
        """Of the scores."""
        usual = self.q.shape[-1] ** -0.5
        return usual if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True)
class MeasureCall:
    """What a backend of ``measure`` gets.

    It returns ``[densities]``, fp32 ``[2]``: of S_c, and of S_s in computed rows. With ``min_skip``
    above 0 it returns new ``kv_bits`` behind them, and the densities are theirs.
    """

    q_bits: Tensor
    kv_bits: Tensor
    num_q_blocks: int
    num_kv_blocks: int
    min_skip: float


@dataclass(frozen=True)
class LiveCall:
    """What a backend of ``live_share`` gets; it returns a new fp32 scalar."""

    q_bits: Tensor
    num_q_blocks: int
    block_m: int
    rows: int
    row_offset: int


def choose(
    q: Tensor,
    k: Tensor,
    grid: Grid,
    rule: Rule,
    progress: Tensor | None = None,
    *,
    guide: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Symbols:
    """Symbols that ``rule`` chooses on the pooled map of q and k.

    Backends differ by rounding alone: in an entry whose mass is within 1e-5 of the threshold.

    Args:
        q: ``[B, M, H, D]``.
        k: ``[B, N, Hkv, D]``.
        grid: blocks, text and valid keys.
        rule: what is chosen, and by what.
        progress: fp32 scalar on the device, (step + 1) / num_steps; for a rule with ``power``.
        guide: fp32 ``[B, H, Mb, T]``, what query blocks give to T text tokens that are not in the
            sequence; rows sum to 1.
        softmax_scale: of the scores, as attention has it; ``D ** -0.5`` by default.
        backend: which one chooses; by default the best that accepts.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device; or the rule needs a
            progress, or text or a guide, and there is none; or a guide although there is text; or
            its resolution does not divide the blocks.
    """
    check_choose(q, k, grid, progress)
    check_scale(softmax_scale)
    if rule.compute in ("and", "mean", "g") and not grid.text_spans and guide is None:
        raise ValueError(f"compute {rule.compute} needs text tokens or a guide, got a {grid}")
    if guide is not None:
        _check_guide(guide, (q.shape[0], q.shape[2], grid.num_q_blocks), grid)
    if rule.power and progress is None:
        raise ValueError(f"progress must be given where power is not 0, got None and {rule}")
    if rule.resolution and (grid.block_m % rule.resolution or grid.block_n % rule.resolution):
        raise ValueError(
            f"resolution must divide blocks of {grid.block_m} x {grid.block_n}, "
            f"got {rule.resolution}"
        )
    call = ChooseCall(q, k, grid, rule, progress, guide, softmax_scale)
    q_bits, kv_bits = execute("choose", call, backend)
    return Symbols(q_bits, kv_bits, grid)


def _check_guide(guide: Tensor, expected: tuple[int, ...], grid: Grid) -> None:
    if grid.text_spans:
        raise ValueError(f"guide must be None where text is in the sequence, got a {grid}")
    if guide.ndim != 4 or guide.shape[:3] != expected or guide.dtype != torch.float32:
        raise ValueError(
            f"guide must be float32 [B, H, Mb, T] with [B, H, Mb] = {list(expected)}, got "
            f"{guide.dtype} {list(guide.shape)}"
        )


def measure(
    symbols: Symbols, min_skip: float = 0.0, *, backend: str | None = None
) -> tuple[Symbols, Tensor, Tensor]:
    """``symbols.fill_rows(min_skip)``, its ``q_density()`` and ``kv_density()``, in one pass."""
    check_symbols(symbols)
    check_min_skip(min_skip)
    grid, q_bits, kv_bits = symbols.grid, symbols.q_bits, symbols.kv_bits
    # What all heads (or the batch) share counts once.
    for dim in (0, 1):
        if q_bits.stride(dim) == 0 and kv_bits.stride(dim) == 0:
            q_bits, kv_bits = q_bits.narrow(dim, 0, 1), kv_bits.narrow(dim, 0, 1)
    call = MeasureCall(q_bits, kv_bits, grid.num_q_blocks, grid.num_kv_blocks, min_skip)
    densities, *filled = execute("measure", call, backend)
    if filled:
        shape = (symbols.batch, symbols.num_heads, -1, -1)
        symbols = Symbols(symbols.q_bits, filled[0].expand(shape), grid)
    q_density, kv_density = densities.unbind()
    return symbols, q_density, kv_density


def live_share(
    symbols: Symbols, rows: int, row_offset: int, *, backend: str | None = None
) -> Tensor:
    """Share of the (token, head) pairs of a stream that are computed: fp32 scalar on the device.

    Args:
        symbols: S_c decides.
        rows: tokens of the stream.
        row_offset: position of its first one in the sequence.
        backend: which one counts; by default the best that accepts.
    """
    check_symbols(symbols)
    grid = symbols.grid
    check_rows(rows, row_offset, grid)
    call = LiveCall(symbols.q_bits, grid.num_q_blocks, grid.block_m, rows, row_offset)
    return execute("live_share", call, backend)


def _take(grid: Grid) -> tuple:
    text = [token for span in grid.text_spans for token in span]
    return (grid.seqlen_q, grid.seqlen_kv, grid.block_m, grid.block_n, grid.kv_len, text)


def _make(
    seqlen_q: int, seqlen_kv: int, block_m: int, block_n: int, kv_len: Tensor | None, text: Any
) -> Grid:
    spans = tuple(("text", *span) for span in zip(text[::2], text[1::2], strict=True))
    return Grid(seqlen_q, seqlen_kv, (0, 0), block_m, block_n, kv_len, spans=spans)


_SIZES = dict.fromkeys(("seqlen_q", "seqlen_kv", "block_m", "block_n"), int)
see_as(Grid, {**_SIZES, "kv_len": Tensor | None, "text": Sequence[int]}, _take, _make)
declare("choose", ChooseCall, public="choose", many=True)
declare("measure", MeasureCall, public="measure", many=True)
declare("live_share", LiveCall, public="live_share")


def first_tensor(call: ChooseCall | MeasureCall | LiveCall) -> Tensor:
    """A tensor of the call: all are on one device."""
    return call.q if isinstance(call, ChooseCall) else call.q_bits


def _define(op: str, run: Callable[[Any], Any]) -> None:
    """Register a definition as ``reference``, on every device, and as ``cpu``."""

    def refuses(call: Any) -> list[str]:
        return not_on("cpu", first_tensor(call))

    register(op, "cpu", rank=10, refuses=refuses, device="cpu")(run)
    register(op, "reference", rank=0)(run)


_define("choose", _definition.choose)
_define("measure", _definition.measure)
_define("live_share", _definition.live_share)
