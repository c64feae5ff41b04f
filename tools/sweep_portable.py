"""Try configurations of the portable attention backend; the best belong in kernels/configs/.

    python tools/sweep_portable.py [--shape flux-1024] [--head-dim 128]
    python tools/sweep_portable.py --anchored --csv docs/results/anchored.csv

Each is checked, then timed in turns with FlexAttention on the same blocks. With ``--anchored`` the
configuration in use is, with the anchored softmax and with the online one in turns.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from flashomni.kernels import sparse_attention
from flashomni.kernels.attention import portable as attention_portable
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import Config
from flashomni.lab import results
from flashomni.lab.ops.baselines import flex_attention
from flashomni.lab.ops.shapes import SHAPES, exact_symbols
from flashomni.lab.ops.timing import interleaved
from flashomni.symbols import Grid

DENSITIES = (1.0, 0.5, 0.25, 0.1)
CANDIDATES = [
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 32, 8, 3),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3),
]  # fmt: skip
SIZES = [  # tokens, heads, head_dim
    (16896, 24, 128), (4608, 24, 128), (16896, 48, 64), (16896, 24, 96), (16896, 12, 256),
    (4608, 12, 256),
]  # fmt: skip


@dataclass
class Anchored:
    """A row of ``--csv``: milliseconds of the two softmaxes, ``gain`` the second by the first."""

    tokens: int
    heads: int
    head_dim: int
    density: float
    anchored_ms: float
    online_ms: float
    gain: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str


def anchored(
    sizes: list[tuple[int, int, int]], densities: tuple[float, ...], device: torch.device
) -> Iterator[Anchored]:
    """Time the configuration in use with both softmaxes, each right before it is timed."""
    about = results.origin(device, " ".join(sys.argv))
    for tokens, num_heads, head_dim in sizes:
        torch.manual_seed(0)
        size = (1, tokens, num_heads, head_dim)
        q, k, v = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3))
        for density in densities:
            symbols = exact_symbols(Grid(tokens, tokens), num_heads, 1.0, density).to(device)
            expected = sparse_attention(q, k, v, symbols, backend="portable")
            out = torch.zeros_like(q)
            call = AttentionCall(q, k, v, out, None, symbols, None, head_dim**-0.5)
            used, runs = portable.config("attention", q, head_dim), {}
            for name in ("anchored", "online"):
                config = used._replace(anchored=name == "anchored")
                attention_portable.launch(call, config)
                torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)
                runs[name] = lambda i, c=call, s=config: attention_portable.launch(c, s)
            ms = interleaved(runs, device, 7, 1)
            gain = ms["online"] / ms["anchored"]
            yield Anchored(
                tokens, num_heads, head_dim, density, round(ms["anchored"], 4),
                round(ms["online"], 4), round(gain, 3), **about,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="flux-1024", choices=SHAPES)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--anchored", action="store_true", help="the two softmaxes, at many sizes")
    parser.add_argument("--csv", type=Path, help="a file for the rows of --anchored")
    options = parser.parse_args()
    if options.csv is not None and not options.anchored:
        parser.error("--csv is of --anchored")
    if options.anchored:
        for row in anchored(SIZES, DENSITIES, torch.device("cuda", 0)):
            size = f"{row.tokens:6} x {row.heads} x {row.head_dim}"
            print(f"{size} {row.density:5} {row.anchored_ms:8.4f} of {row.online_ms:8.4f} ms")
            if options.csv is not None:
                results.append(options.csv, [row])
        return
    shape, device = SHAPES[options.shape], torch.device("cuda", 0)
    size = (1, shape.seqlen, shape.num_heads, options.head_dim)
    torch.manual_seed(0)
    q, k, v = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(3))
    grid = Grid(shape.seqlen, shape.seqlen)
    for density in DENSITIES:
        symbols = exact_symbols(grid, shape.num_heads, 1.0, density).to(device)
        out = torch.zeros_like(q)
        exact = sparse_attention(q, k, v, symbols, backend="portable")
        flex = flex_attention(symbols)
        runs = {"FlexAttention": lambda i, flex=flex: flex(q, k, v)}
        for tile_m, tile_n, warps, stages in CANDIDATES:
            config = Config(tile_m, tile_n, options.head_dim, warps, stages)
            call = AttentionCall(q, k, v, out, None, symbols, None, options.head_dim**-0.5)
            try:
                attention_portable.launch(call, config)
            except OutOfResources:
                continue
            torch.testing.assert_close(out, exact, atol=1e-2, rtol=2e-2)
            runs[str(config)] = lambda i, c=call, s=config: attention_portable.launch(c, s)
        ms = interleaved(runs, device, 7, 1)
        for name in sorted(ms, key=ms.__getitem__):
            print(f"{density:5} {name:80} {ms[name]:8.4f} ms {ms['FlexAttention'] / ms[name]:.3f}")


if __name__ == "__main__":
    main()
