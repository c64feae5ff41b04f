"""Random calls of a GPU attention backend against torch in fp32, up to a count or a time.

    python tests/fuzz/fuzz_attention.py --backend sm90 --count 10000 --seconds 90

Each case draws dtype, head_dim, batch, lengths, heads, GQA ratio, valid keys, densities, strides,
optional outputs and the forecast of cached rows. It fails if a row is off by more than twice the
error of torch's own attention in the same dtype, if a cached row of ``out`` or ``lse`` changed (or
is not the forecast, where the case has one), or if an empty row is not zero and -inf. Some cases
run twelve times and must agree in every bit. Exits with 1 on failure.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass

import torch

from flashomni.kernels import ForecastTerms, sparse_attention
from flashomni.symbols import Grid, Symbols

POISON = 7.0
REPEATS = 12


@dataclass(frozen=True)
class Case:
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
    scale: float | None
    terms: int  # of the forecast; 0 is none
    terms_dtype: torch.dtype
    span: tuple[float, float]  # rows that it covers, as shares of the sequence

    @property
    def num_heads(self):
        return self.kv_heads * self.ratio


def draw(rng: random.Random) -> Case:
    long = rng.random() < 0.15
    lengths = [1, 31, 64, 127, 128, 129, 200, 256, 383, 640, 1000]
    lengths += [2048, 4224, 4608, 5000] if long else []
    return Case(
        dtype=rng.choice([torch.bfloat16, torch.float16]),
        batch=rng.choice([1, 1, 2, 3]),
        seqlen_q=rng.choice([*lengths, rng.randint(1, 700)]),
        seqlen_kv=rng.choice([*lengths, rng.randint(1, 1500)]),
        kv_heads=rng.choice([1, 1, 2, 3]),
        ratio=rng.choice([1, 1, 2, 4]),
        head_dim=rng.choice([64, 128, 128, 128, 72, 80, 96, 32, 256, 160]),
        block_n=rng.choice([128, 128, 128, 64]),
        layout=rng.choice(["separate", "fused", "heads first"]),
        symbols=rng.choice(["none", "each", "each", "each", "shared", "ones", "holes"]),
        has_kv_len=rng.random() < 0.4,
        has_lse=rng.random() < 0.5,
        q_density=rng.choice([0.0, 0.3, 0.7, 1.0]),
        kv_density=rng.choice([0.0, 0.05, 0.3, 0.7, 1.0]),
        scale=rng.choice([None, None, 0.3]),
        terms=rng.choice([0, 0, 1, 2, 3]),
        terms_dtype=rng.choice([torch.bfloat16, torch.float16, torch.float32]),
        span=rng.choice([(0.0, 1.0), (0.0, 0.6), (rng.random() / 2, 1.0), (0.3, 0.5)]),
    )


def tensors(case: Case, device: torch.device) -> list[torch.Tensor]:
    """q, k, v ``[B, S, H, D]``: of their own, slices of one fused tensor, or with heads first."""

    def make(seqlen, heads):
        if case.layout == "heads first":
            x = torch.randn(case.batch, heads, seqlen, case.head_dim, device=device)
            return x.to(case.dtype).transpose(1, 2)
        if case.layout == "fused":
            x = torch.randn(case.batch, seqlen, heads + 2, case.head_dim, device=device)
            return x.to(case.dtype)[:, :, 1:-1]
        return torch.randn(case.batch, seqlen, heads, case.head_dim, device=device).to(case.dtype)

    q = make(case.seqlen_q, case.num_heads)
    return [q, make(case.seqlen_kv, case.kv_heads), make(case.seqlen_kv, case.kv_heads)]


def make_symbols(case: Case, device: torch.device) -> Symbols | None:
    if case.symbols == "none":
        return None
    grid = Grid(case.seqlen_q, case.seqlen_kv, block_n=case.block_n)
    batch, heads = (1, 1) if case.symbols == "shared" else (case.batch, case.num_heads)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    ones = case.symbols == "ones"
    q_mask = torch.rand(batch, heads, rows, device=device) < (1.0 if ones else case.q_density)
    kv_mask = torch.rand(batch, heads, rows, columns, device=device) < (
        1.0 if ones else case.kv_density
    )
    symbols = Symbols.pack(q_mask, kv_mask, grid)
    if case.symbols == "holes":  # rows without any block, which pack never leaves
        keep = torch.rand(batch, heads, rows, 1, device=device) < 0.6
        symbols = Symbols(symbols.q_bits, symbols.kv_bits * keep, grid)
    return symbols.expand(case.batch, case.num_heads) if case.symbols == "shared" else symbols


def make_forecast(case: Case, q: torch.Tensor) -> ForecastTerms | None:
    """Terms in the layout of the case; more coefficients than terms."""
    if not case.terms or case.symbols == "none":
        return None
    start, stop = (round(share * case.seqlen_q) for share in case.span)
    shape = (case.batch, stop - start, case.num_heads, case.head_dim)
    if case.layout == "heads first":
        shape = (case.batch, case.num_heads, stop - start, case.head_dim)
    terms = [torch.randn(shape, device=q.device).to(case.terms_dtype) for _ in range(case.terms)]
    if case.layout == "heads first":
        terms = [term.transpose(1, 2) for term in terms]
    return ForecastTerms(terms, torch.randn(case.terms + 1, device=q.device), start)


def forecast_failures(forecast: ForecastTerms, out: torch.Tensor, rows: torch.Tensor) -> list[str]:
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
    within = cached[:, start : start + count]
    error = (out[:, start : start + count].double() - exact).abs()
    found = []
    if not bool((error <= limit)[within].all()):
        found.append(f"a forecast is off by {(error - limit)[within].max().item():.2e} too much")
    outside = cached.clone()
    outside[:, start : start + count] = False
    if not bool((out[outside] == POISON).all()):
        found.append("a cached row outside of the forecast changed")
    return found


def token_masks(case: Case, symbols: Symbols | None, kv_len: torch.Tensor | None, device):
    """``(rows [B, H, M], pairs [B, H, M, N])``: what is computed, what is visited."""
    shape = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_kv)
    rows = torch.ones(shape[:3], dtype=torch.bool, device=device)
    pairs = torch.ones(shape, dtype=torch.bool, device=device)
    if symbols is not None:
        grid = symbols.grid
        rows = symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., : grid.seqlen_q]
        pairs = symbols.kv_mask().repeat_interleave(grid.block_m, -2)
        pairs = pairs.repeat_interleave(grid.block_n, -1)[..., : grid.seqlen_q, : grid.seqlen_kv]
    if kv_len is not None:
        position = torch.arange(case.seqlen_kv, device=device)
        pairs = pairs & (position < kv_len[:, None, None, None])
    return rows, pairs


def heads_first(x, groups=1):
    return x.repeat_interleave(groups, 2).transpose(1, 2)


def exact_attention(q, k, v, pairs, scale):
    """fp32: out ``[B, M, H, D]`` and lse ``[B, H, M]``; rows without keys are zero."""
    groups = q.shape[2] // k.shape[2]
    score = heads_first(q.float()) @ heads_first(k.float(), groups).mT * scale
    score = score.masked_fill(~pairs, -torch.inf)
    lse = score.logsumexp(-1)
    prob = (score - lse[..., None]).exp().masked_fill(~pairs, 0.0)
    return (prob @ heads_first(v.float(), groups)).transpose(1, 2), lse


def torch_attention(q, k, v, pairs, scale):
    """torch's own attention under the same mask, in the dtype of the arguments."""
    groups = q.shape[2] // k.shape[2]
    o = torch.nn.functional.scaled_dot_product_attention(
        heads_first(q), heads_first(k, groups), heads_first(v, groups), attn_mask=pairs, scale=scale
    )
    return o.transpose(1, 2).masked_fill(~pairs.any(-1).mT[..., None], 0.0)


def failures(case: Case, backend: str | None, device: torch.device, repeats: int) -> list[str]:
    q, k, v = tensors(case, device)
    symbols = make_symbols(case, device)
    kv_len = None
    if case.has_kv_len:
        kv_len = torch.randint(
            0, case.seqlen_kv + 1, (case.batch,), dtype=torch.int32, device=device
        )
    rows, pairs = token_masks(case, symbols, kv_len, device)
    forecast = make_forecast(case, q)
    results = []
    for _ in range(repeats):
        out = torch.full_like(q, POISON)
        lse = torch.full(rows.shape, POISON, device=device) if case.has_lse else None
        sparse_attention(
            q, k, v, symbols, out=out, lse=lse, kv_len=kv_len, softmax_scale=case.scale,
            forecast=forecast, backend=backend,
        )  # fmt: skip
        results.append((out, lse))
    out, lse = results[0]
    found = []
    for other_out, other_lse in results[1:]:
        if not torch.equal(out, other_out) or (lse is not None and not torch.equal(lse, other_lse)):
            found.append("repeats differ")
            break
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    exact, expected_lse = exact_attention(q, k, v, pairs, scale)
    plain = torch_attention(q, k, v, pairs, scale).float()
    live = rows.mT[..., None].expand_as(q)
    if forecast is not None:
        found += forecast_failures(forecast, out, rows)
    elif not bool((out[~live] == POISON).all()):
        found.append("a cached row of out changed")
    if bool(live.any()):
        error = (out.float() - exact)[live].abs().max().item()
        # torch may hit the exact value by luck: what rounding the largest output costs is allowed.
        floor = torch.finfo(case.dtype).eps / 2 * exact[live].abs().max().item()
        limit = 2 * (plain - exact)[live].abs().max().item() + floor
        if not error <= limit:
            found.append(f"out is off by {error:.2e}, allowed {limit:.2e}")
    empty = rows & ~pairs.any(-1)
    if not bool((out[empty.mT] == 0).all()):
        found.append("an empty row is not zero")
    if lse is not None:
        close = torch.isclose(lse, expected_lse, atol=2e-3, rtol=1e-3)
        if not bool((close | ~rows).all()):
            worst = (lse - expected_lse)[rows & ~close].abs().max().item()
            found.append(f"lse is off by {worst:.2e}")
        if not bool((lse[~rows] == POISON).all()):
            found.append("a cached row of lse changed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="sm90")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every case before it runs")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    start = time.monotonic()
    done, wrong, refused, repeated = 0, 0, {}, 0
    tally: dict[str, int] = {}
    for index in range(options.count):
        if time.monotonic() - start > options.seconds:
            break
        case = draw(rng)
        if options.verbose:
            print(index, case, flush=True)
        repeats = REPEATS if index % 8 == 0 else 1
        try:
            found = failures(case, options.backend, device, repeats)
        except NotImplementedError as error:
            reason = str(error).splitlines()[-1].strip()
            refused[reason] = refused.get(reason, 0) + 1
            continue
        done += 1
        repeated += repeats > 1
        for key in (
            f"head_dim {case.head_dim}",
            f"symbols {case.symbols}",
            f"layout {case.layout}",
            f"terms {case.terms if case.symbols != 'none' else 0}",
        ):
            tally[key] = tally.get(key, 0) + 1
        if found:
            wrong += 1
            print(f"FAILED case {index}: {'; '.join(found)}\n  {case}", flush=True)
            if wrong >= 20:
                break
    print(f"backend {options.backend}, seed {options.seed}, {time.monotonic() - start:.0f} s")
    for key, number in sorted(tally.items()):
        print(f"  {key:24} {number:6}")
    for reason, number in sorted(refused.items()):
        print(f"  refused {number:6}  {reason}")
    print(f"{done} cases, {repeated} of them {REPEATS} times, {wrong} failed")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
