"""Random calls of attention and their definition: a third is hard for an anchored softmax.

A case is drawn from its number alone, so that any of a campaign can be run again. What is wrong
with an answer is in ``attention_faults``.
"""

import math
import random
from dataclasses import dataclass, replace

import torch

from adversarial import CASES, attention_inputs
from flashomni.kernels import ForecastTerms, Summary, sparse_attention, summarise
from flashomni.symbols import Grid, Symbols

POISON = 7.0
PLAIN = ("gain", 1.0)
SHORT = [1, 31, 64, 127, 128, 129, 200, 256, 257, 383, 600]
LONG = [2048, 4224, 4608]


@dataclass(frozen=True)
class Case:
    number: int
    dtype: torch.dtype
    batch: int
    seqlen_q: int
    seqlen_kv: int
    kv_heads: int
    ratio: int
    head_dim: int
    block_n: int
    layout: str
    symbols: str
    has_kv_len: bool
    has_lse: bool
    q_density: float
    kv_density: float
    scale: float
    terms: int  # of the forecast; 0 is none
    terms_dtype: torch.dtype
    span: tuple[float, float]  # rows that it covers, as shares of the sequence
    kind: str
    amount: float
    per_block: int  # summaries of a skipped block; 0 drops it

    @property
    def num_heads(self):
        return self.kv_heads * self.ratio

    @property
    def shape(self):
        return (
            self.batch, self.seqlen_q, self.seqlen_kv, self.num_heads, self.kv_heads, self.head_dim
        )  # fmt: skip

    @property
    def build(self):
        """Cases that differ in this run other kernels."""
        return (
            self.dtype, self.head_dim, self.block_n, self.symbols == "none", self.has_kv_len,
            self.has_lse, self.terms, self.terms and self.terms_dtype, self.per_block,
        )  # fmt: skip


def draw(number: int, seed: int = 0) -> Case:
    """Every third is adversarial. Options are drawn so that few kernels have to be built."""
    rng = random.Random(f"{seed} {number}")
    kind, amount = rng.choice(CASES) if number % 3 == 2 else PLAIN
    if kind == "gain" and number % 3 == 2:
        amount = rng.uniform(2.0, 40.0)
    dtype = torch.float16 if kind != "values" and rng.random() < 0.15 else torch.bfloat16
    head_dim = rng.choice([64, 64, 128, 128, 128, 128, 72, 80, 96, 32, 256, 160])
    usual = dtype == torch.bfloat16 and head_dim in (64, 128)
    if head_dim not in (64, 128):
        dtype = torch.bfloat16
    long = rng.random() < 0.02
    symbols = rng.choice(["none", "each", "each", "each", "shared", "ones", "holes"])
    has_terms = head_dim == 128 and symbols != "none" and rng.random() < 0.3
    return Case(
        number=number,
        dtype=dtype,
        batch=1 if long else rng.choice([1, 1, 2, 3]),
        seqlen_q=rng.choice([*(LONG if long else SHORT), rng.randint(1, 700)]),
        seqlen_kv=rng.choice([*(LONG if long else SHORT), rng.randint(1, 1200)]),
        kv_heads=1 if long else rng.choice([1, 1, 2, 3]),
        ratio=rng.choice([1, 1, 2] if long else [1, 1, 2, 4]),
        head_dim=head_dim,
        block_n=64 if head_dim == 128 and usual and rng.random() < 0.2 else 128,
        layout=rng.choice(["separate", "fused", "heads first"]),
        symbols=symbols,
        has_kv_len=rng.random() < 0.4,
        has_lse=not usual or rng.random() < 0.5,
        q_density=rng.choice([0.0, 0.3, 0.7, 1.0]),
        kv_density=rng.choice([0.0, 0.05, 0.3, 0.7, 1.0]),
        scale=rng.choice([head_dim**-0.5, head_dim**-0.5, 0.3]),
        terms=rng.choice([1, 2, 3]) if has_terms else 0,
        terms_dtype=rng.choice([torch.bfloat16, torch.float32]),
        span=rng.choice([(0.0, 1.0), (0.0, 0.6), (rng.random() / 2, 1.0), (0.3, 0.5)]),
        kind=kind,
        amount=amount,
        # Of head_dim 128 any number, of others one: each is a kernel of its own.
        per_block=rng.choice([0, 0, 4, 4, 1, 16] if head_dim == 128 else [0, 0, 4])
        if symbols != "none"
        else 0,
    )


@dataclass(frozen=True)
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    symbols: Symbols | None
    kv_len: torch.Tensor | None
    forecast: ForecastTerms | None
    summary: Summary | None = None


def make(case: Case, device: torch.device, kind: tuple[str, float] | None = None) -> Inputs:
    """The tensors of a case; with values of another ``kind`` where one is given."""
    torch.manual_seed(case.number)
    kind, amount = kind or (case.kind, case.amount)
    tensors = attention_inputs(kind, amount, case.shape, case.scale, case.dtype, device)
    q, k, v = (_laid_out(x, case.layout) for x in tensors)
    kv_len = None
    if case.has_kv_len:
        kv_len = torch.randint(
            0, case.seqlen_kv + 1, (case.batch,), dtype=torch.int32, device=device
        )
    symbols, forecast = _symbols(case, device), _forecast(case, device)
    summary = None
    if case.per_block:
        summary = summarise(k, v, symbols.grid, case.per_block, kv_len=kv_len, backend="reference")
        parts = (_laid_out(x, case.layout) for x in (summary.k, summary.v))
        summary = Summary(*parts, summary.log_n)
    return Inputs(q, k, v, symbols, kv_len, forecast, summary)


def _laid_out(x, layout):
    """``[B, S, H, D]`` as of its own, a slice of one fused tensor, or with heads first."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "fused":
        wide = x.new_full((*x.shape[:2], x.shape[2] + 2, x.shape[3]), math.nan)
        wide[:, :, 1:-1] = x
        return wide[:, :, 1:-1]
    return x


def _symbols(case, device):
    if case.symbols == "none":
        return None
    grid = Grid(case.seqlen_q, case.seqlen_kv, block_n=case.block_n)
    batch, heads = (1, 1) if case.symbols == "shared" else (case.batch, case.num_heads)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    q_density, kv_density = (case.q_density, case.kv_density)
    if case.symbols == "ones":
        q_density = kv_density = 1.0
    q_mask = torch.rand(batch, heads, rows, device=device) < q_density
    kv_mask = torch.rand(batch, heads, rows, columns, device=device) < kv_density
    symbols = Symbols.pack(q_mask, kv_mask, grid)
    if case.symbols == "holes":  # rows without any block, which pack never leaves
        keep = torch.rand(batch, heads, rows, 1, device=device) < 0.6
        symbols = Symbols(symbols.q_bits, symbols.kv_bits * keep, grid)
    return symbols.expand(case.batch, case.num_heads) if case.symbols == "shared" else symbols


def _forecast(case, device):
    """Terms in the layout of the case; more coefficients than terms."""
    if not case.terms:
        return None
    start, stop = (round(share * case.seqlen_q) for share in case.span)
    shape = (case.batch, stop - start, case.num_heads, case.head_dim)
    terms = [
        _laid_out(torch.randn(shape, device=device).to(case.terms_dtype), case.layout)
        for _ in range(case.terms)
    ]
    return ForecastTerms(terms, torch.randn(case.terms + 1, device=device), start)


def attend(case, x, backend, out, lse=None, redone=None):
    """Our call; ``redone`` gets the number of tiles done again."""
    sparse_attention(
        x.q, x.k, x.v, x.symbols, out=out, lse=lse, kv_len=x.kv_len, softmax_scale=case.scale,
        forecast=x.forecast, redone=redone, summary=x.summary, backend=backend,
    )  # fmt: skip
    return out


def token_masks(case, x):
    """``(rows [B, H, M], pairs [B, H, M, N])``: what is computed, what is visited."""
    batch, seqlen_q, seqlen_kv, heads, _, _ = case.shape
    rows = torch.ones(batch, heads, seqlen_q, dtype=torch.bool, device=x.q.device)
    pairs = rows[..., None].expand(-1, -1, -1, seqlen_kv)
    if x.symbols is not None:
        grid = x.symbols.grid
        rows = x.symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., :seqlen_q]
        pairs = x.symbols.kv_mask().repeat_interleave(grid.block_m, -2)
        pairs = pairs.repeat_interleave(grid.block_n, -1)[..., :seqlen_q, :seqlen_kv]
    if x.kv_len is not None:
        position = torch.arange(seqlen_kv, device=x.q.device)
        pairs = pairs & (position < x.kv_len[:, None, None, None])
    return rows, pairs


def with_summaries(case, x, pairs):
    """``(x, pairs, bias)`` in which summaries are keys like others, their weight in a bias.

    The bias is fp32 ``[B, 1, 1, N + S]``, ``None`` where there are none. A summary takes part in
    the rows that skip its block, if it stands for any key.
    """
    if x.summary is None:
        return x, pairs, None
    grid, log_n = x.symbols.grid, x.summary.log_n[:, None, None]
    parts = (~x.symbols.kv_mask()).repeat_interleave(grid.block_m, -2)
    parts = parts.repeat_interleave(case.per_block, -1)[..., : case.seqlen_q, :]
    pairs = torch.cat([pairs, parts & (log_n > -torch.inf)], -1)
    bias = torch.cat([log_n.new_zeros(case.batch, 1, 1, case.seqlen_kv), log_n], -1)
    k, v = (torch.cat(pair, 1) for pair in ((x.k, x.summary.k), (x.v, x.summary.v)))
    return replace(x, k=k, v=v), pairs, bias


def heads_first(x, groups=1):
    return x.repeat_interleave(groups, 2).transpose(1, 2)


def exact_attention(case, x, pairs, bias=None):
    """fp32: out ``[B, M, H, D]`` and lse ``[B, H, M]``; rows without keys are zero."""
    k, v = (heads_first(y.float(), case.ratio) for y in (x.k, x.v))
    score = heads_first(x.q.float()) @ k.mT * case.scale
    if bias is not None:
        score = score + bias
    score = score.masked_fill(~pairs, -torch.inf)
    lse = score.logsumexp(-1)
    prob = (score - lse[..., None]).exp().masked_fill(~pairs, 0.0)
    return (prob @ v).transpose(1, 2), lse


def torch_attention(case, x, pairs, bias=None):
    """torch's own attention under the same mask, in the dtype of the arguments.

    It adds masks, so that NaN shows in rows that do not visit it: it gets none.
    """
    q, k, v = heads_first(x.q), heads_first(x.k, case.ratio), heads_first(x.v, case.ratio)
    k = torch.where(k.isnan(), 0.0, k)
    if bias is not None:
        q, k, v = _with_bias(case, q, k, v, bias)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=case.scale)
    o = o[..., : case.head_dim]
    return o.transpose(1, 2).masked_fill(~pairs.any(-1).mT[..., None], 0.0)


def _with_bias(case, q, k, v, bias):
    """Eight more columns: a bias in the dtype of q would be rounded, products are not."""
    bias = bias.masked_fill(bias == -torch.inf, 0.0)[:, :, 0, :, None] / case.scale
    high = bias.to(q.dtype)
    columns = [high, (bias - high).to(q.dtype)]
    k = torch.cat([k, *(one.expand(*k.shape[:3], 1) for one in columns)], -1)
    pad = torch.nn.functional.pad
    return pad(pad(q, (0, 2), value=1.0), (0, 6)), pad(k, (0, 6)), pad(v, (0, 8))
