"""Speed of the portable attention backend against FlexAttention with the same block mask.

    python benchmarks/portable_h200.py [--sweep]

``--sweep`` tries configurations and prints the best; its figures are the source of
``kernels/_portable_configs.py``. Medians of interleaved CUDA-graph replays.
"""

import argparse
import functools

import torch
from attention_h200 import HEADS, Timer, guarded, inputs, measure, random_bits
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flashomni.kernels import attention_portable, sparse_attention
from flashomni.kernels._portable_configs import ATTENTION, Config
from flashomni.kernels.attention import AttentionCall
from flashomni.symbols import Grid, Symbols

CANDIDATES = [
    Config(tile_m, tile_n, 128, warps, stages)
    for tile_m, tile_n, warps, stages in (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 32, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
    )
]  # fmt: skip


def block_mask(symbols):
    """FlexAttention's mask of the same blocks, all of them full."""
    visits = symbols.kv_mask() & symbols.q_mask()[..., None]
    counts = visits.sum(-1, dtype=torch.int32)
    order = visits.int().argsort(dim=-1, descending=True, stable=True).int()
    none = torch.zeros_like(counts), torch.zeros_like(order)
    return BlockMask.from_kv_blocks(
        *none, counts, order, BLOCK_SIZE=128,
        seq_lengths=(symbols.grid.seqlen_q, symbols.grid.seqlen_kv),
    )  # fmt: skip


compiled_flex = torch.compile(flex_attention, dynamic=False)


def flex(mask):
    def run(q, k, v, out):
        compiled_flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)

    return run


def ours(symbols, config):
    def run(q, k, v, out):
        call = AttentionCall(q, k, v, out, None, symbols, None, q.shape[-1] ** -0.5)
        attention_portable.launch(call, config)

    return run


def check(symbols, sets, config):
    q, k, v = sets[0]
    got, want = torch.zeros_like(q), torch.zeros_like(q)
    ours(symbols, config)(q, k, v, got)
    part = slice(3, 4)
    one = Symbols(symbols.q_bits[:, part], symbols.kv_bits[:, part], symbols.grid)
    want = torch.zeros_like(q[:, :, part], dtype=torch.float32)
    sparse_attention(
        *(x[:, :, part].float() for x in (q, k, v)), one, out=want, backend="reference"
    )
    torch.testing.assert_close(got[:, :, part].float(), want, atol=5e-3, rtol=2e-2)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    chosen = ATTENTION["sm90", 128, 2]
    torch.manual_seed(0)
    for seqlen in (4608,) if options.sweep else (4608, 16896):
        sets = inputs(seqlen)
        for density in (1.0, 0.5, 0.25, 0.1):
            bits = random_bits(seqlen, density)
            if density == 1:
                bits = Symbols.dense(Grid(seqlen, seqlen), 1, HEADS, "cuda")
            timers = []
            for config in CANDIDATES if options.sweep else [chosen]:
                make = functools.partial(Timer, str(tuple(config)), ours(bits, config), sets, bits)
                if guarded(str(config), check, bits, sets, config):
                    timers.append(make())
            timers.append(Timer("flex", flex(block_mask(bits)), sets, bits))
            measure(timers, 7, float("inf"))
            base = timers[-1].ms
            for timer in sorted(timers, key=lambda timer: timer.ms)[:6]:
                print(
                    f"{seqlen:6} density {density:4} {timer.name:24} {timer.ms:8.4f} ms "
                    f"{base / timer.ms:6.3f} of flex"
                )


if __name__ == "__main__":
    main()
