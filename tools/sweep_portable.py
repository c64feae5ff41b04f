"""Try configurations of the portable attention backend; the best belong in kernels/configs/.

    python tools/sweep_portable.py [--shape flux-1024] [--head-dim 128]

Each is checked, then timed in turns with FlexAttention on the same blocks.
"""

import argparse

import torch
from triton.runtime.errors import OutOfResources

from flashomni.kernels import sparse_attention
from flashomni.kernels.attention import portable as attention_portable
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common.configs import Config
from flashomni.lab.ops.baselines import flex_attention
from flashomni.lab.ops.shapes import SHAPES, exact_symbols
from flashomni.lab.ops.timing import interleaved
from flashomni.symbols import Grid

DENSITIES = (1.0, 0.5, 0.25, 0.1)
CANDIDATES = [
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 32, 8, 3),
    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 32, 4, 3),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="flux-1024", choices=SHAPES)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
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
