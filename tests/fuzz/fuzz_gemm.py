"""Random campaign against the GEMM ops on a GPU: every option, ragged, strided, poisoned.

    python tests/fuzz/fuzz_gemm.py --count 31000 --seconds 120 --jobs 12

A case draws sizes, strides, options and symbols, fills outputs and cached inputs with poison, and
checks: the error is at most twice that of torch in the same dtype, both against fp64; what must not
be written is untouched; a second call gives the same bits. `--start NUMBER --count 1 --jobs 1` runs
a case again. Exits 1 on any failure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from flashomni.kernels import gemm_o_update, sparse_gemm_o, sparse_gemm_q
from flashomni.kernels.common.rows import tile_mask
from flashomni.symbols import Grid, Symbols

DTYPES = (torch.bfloat16, torch.float16)
FLOOR = 8 * torch.finfo(torch.float32).eps  # torch may hit the exact value by luck
POISON = 7.0


@dataclass
class Tally:
    """Results of one op."""

    cases: int = 0
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0  # largest error over torch's


class Draw:
    """Random sizes and tensors of one case."""

    def __init__(self, seed: int, device: str) -> None:
        self.pick = random.Random(seed)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        """Small ones often, large ones sometimes."""
        return self.pick.randint(low, max(low, int(high ** self.pick.uniform(0.3, 1.0))))

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(dtype)

    def rows_of(self, batch: int, rows: int, *rest: int, dtype: torch.dtype) -> Tensor:
        """``[batch, rows, *rest]``: whole, or a run of tokens of a longer sequence."""
        before, after = (self.pick.choice((0, 0, 5, 130)) for _ in range(2))
        return self.randn(batch, before + rows + after, *rest, dtype=dtype)[
            :, before : before + rows
        ]

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A weight: whole, or a slice of a wider one."""
        wide = self.pick.choice((0, 0, 8, 64))
        values = self.randn(rows + wide, columns + wide, dtype=dtype) / columns**0.5
        return values[wide:, wide:]

    def symbols(self, batch: int, heads: int, rows: int) -> tuple[Symbols, int]:
        """Symbols of a sequence that contains the stream, and where the stream starts."""
        block = self.pick.choice((128, 128, 128, 256))
        offset = self.pick.choice((0, 0, 77, 128, 512, self.pick.randint(0, 600)))
        seqlen = offset + rows + self.pick.choice((0, 0, 1, 300))
        grid = Grid(seqlen, seqlen, block_m=block)
        density = self.pick.choice((0.0, 0.05, 0.25, 0.5, 0.9, 1.0))
        shared = self.pick.random() < 0.1
        shape = (1, 1) if shared else (batch, heads)
        q_mask = torch.rand(*shape, grid.num_q_blocks, generator=self.generator, device=self.device)
        kv_mask = torch.ones(
            *shape, grid.num_q_blocks, grid.num_kv_blocks, dtype=torch.bool, device=self.device
        )
        symbols = Symbols.pack(q_mask < density, kv_mask, grid)
        return symbols.expand(batch, heads), offset


class Checker:
    """Compares results of one case; collects what is wrong."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.worst = 0.0

    def close(self, name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
        if got.numel() == 0:
            return
        ours = (got.double() - exact).abs().max()
        torchs = (plain.double() - exact).abs().max()
        floor = FLOOR * max(1.0, float(exact.abs().max()))
        ratio = float(ours / (torchs + floor / 2))
        self.worst = max(self.worst, ratio)
        if not ratio <= 2.0:  # NaN is wrong as well
            self.wrong.append(f"{name}: error {float(ours):.3e}, torch's {float(torchs):.3e}")

    def equal(self, name: str, a: Tensor, b: Tensor) -> None:
        if not torch.equal(a, b):
            self.wrong.append(f"{name} differs")


def padded(shape: tuple[int, ...], dtype: torch.dtype, pick: random.Random, device: str) -> Tensor:
    """Poisoned memory with tokens before and after an output of ``shape`` ``[B, R, ...]``."""
    before, after = (pick.choice((0, 3, 130)) for _ in range(2))
    whole = torch.full(
        (shape[0], before + shape[1] + after, *shape[2:]), POISON, dtype=dtype, device=device
    )
    whole[:, before : before + shape[1]].fill_(pick.choice((POISON, float("nan"))))
    return whole.view(whole.shape)[:, before : before + shape[1]]


def outside_is_untouched(check: Checker, out: Tensor) -> None:
    """The tokens around a padded output still hold the poison."""
    whole = out._base
    assert whole is not None
    start = out.storage_offset() // whole.stride(1)
    around = torch.cat([whole[:, :start], whole[:, start + out.shape[1] :]], 1)
    if not (around == POISON).all():
        check.wrong.append("memory around the output was written")


def q_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, options: dict
) -> Tensor:
    """Plain torch in the dtype of its inputs."""
    q = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, -1))
    if "norm_eps" in options:
        scale = options.get("norm_weight")
        scale = None if scale is None else scale.to(q.dtype)
        q = torch.nn.functional.rms_norm(q, q.shape[-1:], scale, options["norm_eps"])
    if "rope" in options:
        cos, sin = (table.to(q.dtype)[:, None] for table in options["rope"])
        turned = torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2)
        q = q * cos + turned * sin
    return q


def case_q(seed: int, device: str, backend: str, kind: tuple) -> Checker:
    """One call of ``sparse_gemm_q``; ``kind`` is (dtype, head_dim, bias, norm, scale, rope)."""
    dtype, head_dim, has_bias, has_norm, has_scale, has_rope = kind
    draw, check = Draw(seed, device), Checker()
    batch, rows = draw.size(1, 4), draw.size(1, 900)
    heads, features = draw.size(1, 64), 8 * draw.size(1, 400)
    symbols, offset = draw.symbols(batch, heads, rows)
    x = draw.rows_of(batch, rows, features, dtype=dtype)
    weight = draw.matrix(heads * head_dim, features, dtype)
    bias = draw.randn(heads * head_dim, dtype=dtype) if has_bias else None
    options: dict = {}
    if has_norm:
        options["norm_eps"] = 1e-6
        if has_scale:
            options["norm_weight"] = draw.randn(head_dim, dtype=dtype)
    if has_rope:
        angle = draw.randn(rows, head_dim // 2, dtype=torch.float32) * 3
        options["rope"] = tuple(t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
    out = padded((batch, rows, heads, head_dim), dtype, draw.pick, device)
    before = out.clone()
    sparse_gemm_q(x, weight, bias, symbols, row_offset=offset, out=out, backend=backend, **options)
    outside_is_untouched(check, out)
    live = tile_mask(symbols, rows, offset)[..., None].expand_as(out)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = q_definition(*wide, heads, options)
    plain = q_definition(x, weight, bias, heads, options)
    check.close("out", out[live], plain[live], exact[live])
    check.equal("a cached tile", out[~live].nan_to_num(nan=3.0), before[~live].nan_to_num(nan=3.0))
    again = before.clone()
    sparse_gemm_q(
        x, weight, bias, symbols, row_offset=offset, out=again, backend=backend, **options
    )
    check.equal("a second call", again[live], out[live])
    return check


class Projection:
    """What the two GEMM-O ops share: a stream, a weight, symbols."""

    def __init__(self, draw: Draw, kind: tuple) -> None:
        self.dtype, self.head_dim, self.has_bias, self.has_always, self.term_dtype = kind
        self.batch, self.rows = draw.size(1, 4), draw.size(1, 900)
        self.heads, self.features = draw.size(1, 64), 8 * draw.size(1, 150)
        self.extra = 8 * draw.size(1, 100) if self.has_always else 0
        self.symbols, self.offset = draw.symbols(self.batch, self.heads, self.rows)
        self.width = self.heads * self.head_dim
        self.weight = draw.matrix(self.features, self.width + self.extra, self.dtype)
        self.bias = draw.randn(self.features, dtype=self.dtype) if self.has_bias else None
        self.always = None
        if self.has_always:
            self.always = draw.rows_of(self.batch, self.rows, self.extra, dtype=self.dtype)
        self.live = tile_mask(self.symbols, self.rows, self.offset)[..., None]
        self.draw = draw

    def heads_of_tokens(self) -> Tensor:
        return self.draw.rows_of(self.batch, self.rows, self.heads, self.head_dim, dtype=self.dtype)

    def project(self, o: Tensor, wide: bool, rest: bool = True) -> Tensor:
        """``linear`` in the dtype of the call or in fp64, with what belongs to no head or not."""
        x, weight, bias = o.flatten(2), self.weight[:, : self.width], None
        if rest:
            bias = self.bias
            if self.always is not None:
                x, weight = torch.cat([x, self.always], -1), self.weight
        tensors = [None if t is None else (t.double() if wide else t) for t in (x, weight, bias)]
        return torch.nn.functional.linear(*tensors)

    def output(self, device: str, *lead: int, dtype: torch.dtype | None = None) -> Tensor:
        shape = (*lead, self.batch, self.rows, self.features)
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=device)


def case_o(seed: int, device: str, backend: str, kind: tuple) -> Checker:
    """One call of ``sparse_gemm_o``; the last entry of ``kind`` is the number of bias terms."""
    draw, check = Draw(seed, device), Checker()
    layer = Projection(draw, kind[:-1])
    count = kind[-1]
    o = layer.heads_of_tokens()
    clean = o.masked_fill(~layer.live, 0.0)
    o.masked_fill_(~layer.live, float("nan"))  # cached tiles may not be read
    terms = coefficients = None
    exact, plain = layer.project(clean, True), layer.project(clean, False)
    if count:
        shape = (count, layer.batch, layer.rows, layer.features)
        terms = draw.randn(*shape, dtype=layer.term_dtype)
        coefficients = draw.randn(count, dtype=torch.float32)
        exact = exact + torch.einsum("t,tbrn->brn", coefficients.double(), terms.double())
        for coefficient, term in zip(coefficients, terms, strict=True):
            plain = plain + (coefficient * term).to(plain.dtype)
    options = {"always": layer.always, "row_offset": layer.offset, "backend": backend}
    arguments = (o, layer.weight, layer.bias, layer.symbols, terms, coefficients)
    out = padded((layer.batch, layer.rows, layer.features), layer.dtype, draw.pick, device)
    sparse_gemm_o(*arguments, out=out, **options)
    outside_is_untouched(check, out)
    check.close("out", out, plain, exact)
    again = sparse_gemm_o(*arguments, out=layer.output(device), **options)
    check.equal("a second call", again, out)
    return check


def case_update(seed: int, device: str, backend: str, kind: tuple) -> Checker:
    """One call of ``gemm_o_update``; the last entry of ``kind`` is the number of terms."""
    draw, check = Draw(seed, device), Checker()
    layer = Projection(draw, kind[:-1])
    history = [layer.heads_of_tokens() for _ in range(kind[-1])]
    options = {"always": layer.always, "row_offset": layer.offset, "backend": backend}
    results = []
    for _ in range(2):
        out = layer.output(device)
        terms = layer.output(device, len(history), dtype=layer.term_dtype)
        arguments = (history, layer.weight, layer.bias, layer.symbols)
        gemm_o_update(*arguments, out=out, bias_terms=terms, **options)
        results.append((out, terms))
    out, terms = results[0]
    check.close("out", out, layer.project(history[0], False), layer.project(history[0], True))
    for index, o in enumerate(history):
        cached = o.masked_fill(layer.live, 0.0)
        plain = layer.project(cached, False, rest=False).to(layer.term_dtype)
        exact = layer.project(cached, True, rest=False)
        check.close(f"bias_terms[{index}]", terms[index], plain, exact)
    for name, first, second in zip(("out", "bias_terms"), *results, strict=True):
        check.equal(f"{name} of a second call", first, second)
    return check


def kinds() -> dict[str, tuple]:
    """Per op its case and every combination of options."""
    both = (False, True)
    q = [
        (dtype, head_dim, bias, norm, scale, rope)
        for dtype, head_dim, bias, norm, scale, rope in itertools.product(
            DTYPES, (64, 128), both, both, both, both
        )
        if norm or not scale
    ]
    o = list(itertools.product(DTYPES, (64, 128), both, both, DTYPES, (0, 1, 2, 3)))
    update = list(itertools.product(DTYPES, (64, 128), both, both, DTYPES, (1, 2, 3)))
    return {
        "gemm_q": (case_q, q),
        "gemm_o": (case_o, o),
        "gemm_o_update": (case_update, update),
    }


def warm(part: int, parts: int, device: str, backend: str) -> None:
    """Compile a share of the kernels into Triton's cache on disk."""
    every = [(run, kind) for run, options in kinds().values() for kind in options]
    # Kinds that differ in the number of terms alone share a kernel, but for none.
    every = [(run, kind) for run, kind in every if run is case_q or kind[-1] in (0, 1)]
    for run, kind in every[part::parts]:
        run(0, device, backend, kind)


def run(arguments: argparse.Namespace, numbers: list[int], seconds: float) -> dict[str, Tally]:
    """Cases one after the other, the ops in turns."""
    start, chosen = time.perf_counter(), kinds()
    tallies = {op: Tally() for op in chosen}
    for number in numbers:
        if time.perf_counter() - start > seconds:
            break
        seed = arguments.seed * 1_000_003 + number
        op = list(chosen)[number % len(chosen)]
        case, options = chosen[op]
        kind = random.Random(seed).choice(options)
        tally = tallies[op]
        tally.cases += 1
        try:
            check = case(seed, arguments.device, arguments.backend, kind)
        except Exception:
            tally.failures.append(f"case {number}: {traceback.format_exc(limit=-3)}")
            if arguments.device == "cuda" and "CUDA error" in tally.failures[-1]:
                break  # the context is lost
            continue
        tally.worst = max(tally.worst, check.worst)
        if check.wrong:
            tally.failures.append(f"case {number}, {kind}: {'; '.join(check.wrong)}")
    return tallies


def spread(arguments: argparse.Namespace, mode: str, seconds: float) -> dict[str, Tally]:
    """``--warm`` or ``--part`` in several processes; the sum of what they found."""
    names = ("device", "backend", "start", "count", "seed")
    shared = [f"--{name}={getattr(arguments, name)}" for name in names]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *shared, f"--seconds={seconds}", mode,
             f"{part}/{arguments.jobs}"],
            stdout=subprocess.PIPE, text=True,
        )
        for part in range(arguments.jobs)
    ]  # fmt: skip
    total = {op: Tally() for op in kinds()}
    for worker in workers:
        said, _ = worker.communicate()
        if worker.returncode:
            print(f"a process of {mode} ended with {worker.returncode}", flush=True)
            total["gemm_q"].failures.append(f"a process of {mode} was lost")
        elif mode == "--part":
            for op, found in json.loads(said.splitlines()[-1]).items():
                total[op].cases += found["cases"]
                total[op].failures += found["failures"]
                total[op].worst = max(total[op].worst, found["worst"])
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=90.0, help="warm-up included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="sm90")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers = list(range(arguments.start, arguments.start + arguments.count))
    if arguments.warm or arguments.part:
        part, parts = (int(n) for n in (arguments.warm or arguments.part).split("/"))
        if arguments.warm:
            warm(part, parts, arguments.device, arguments.backend)
        else:
            found = run(arguments, numbers[part::parts], arguments.seconds)
            print(json.dumps({op: asdict(tally) for op, tally in found.items()}))
        return 0
    start = time.perf_counter()
    if arguments.jobs == 1:
        tallies = run(arguments, numbers, arguments.seconds)
    else:
        lost = spread(arguments, "--warm", arguments.seconds)["gemm_q"].failures
        left = arguments.seconds - (time.perf_counter() - start)
        print(f"warm-up {time.perf_counter() - start:.1f} s", flush=True)
        tallies = spread(arguments, "--part", left)
        tallies["gemm_q"].failures += lost
    for op, tally in tallies.items():
        for failure in tally.failures[:5]:
            print(f"FAILED {op} {failure}")
    told = [
        f"{op} {tally.cases} cases, {len(tally.failures)} failed, largest error over torch's "
        f"{tally.worst:.2f}"
        for op, tally in tallies.items()
    ]
    print(f"{arguments.backend}: {'; '.join(told)}; {time.perf_counter() - start:.0f} s")
    failed = any(tally.failures for tally in tallies.values())
    return 1 if failed or not all(tally.cases for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
