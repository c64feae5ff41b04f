"""Speed of the Hopper attention backend against cuDNN, as ratios within one run.

    python benchmarks/attention_h200.py [--seconds 90] [--variants]

Checks the result first. Every candidate is captured in a CUDA graph that runs for some
milliseconds over rotating inputs; rounds visit the candidates in random order; medians are shown.
``linear`` is density times the speed-up over this backend's own dense time: 1 where time falls
with the work. A part that fails says so and the rest goes on.
"""

import argparse
import dataclasses
import random
import statistics
import time
import traceback

import torch

from flashomni.kernels import attention_sm90, sparse_attention
from flashomni.kernels.attention import AttentionCall
from flashomni.symbols import Grid, Symbols

HEADS, HEAD_DIM = 24, 128
SEQLENS = (4608, 16896, 33024)
DENSITIES = (0.5, 0.25, 0.1)
ROUND_MS = 6.0
DEVICE = torch.device("cuda", 0)


def random_bits(seqlen, kv_density, q_density=1.0, batch=1, heads=HEADS):
    """Independent random blocks; block 0 of keys is always visited."""
    grid = Grid(seqlen, seqlen)
    rows = grid.num_q_blocks
    q_mask = torch.rand(batch, heads, rows, device=DEVICE) < q_density
    kv_mask = torch.rand(batch, heads, rows, rows, device=DEVICE) < kv_density
    return Symbols.pack(q_mask, kv_mask, grid)


def inputs(seqlen):
    """Enough sets that rotating them does not leave all in L2."""
    sets = 4 if seqlen < 8192 else 1
    shape = (1, seqlen, HEADS, HEAD_DIM)
    return [
        tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        for _ in range(sets)
    ]


def ours(symbols, config=None):
    def run(q, k, v, out):
        if config is None:
            sparse_attention(q, k, v, symbols, out=out, backend="sm90")
        else:
            call = AttentionCall(q, k, v, out, None, symbols, None, q.shape[-1] ** -0.5)
            attention_sm90.launch(call, config)

    return run


def cudnn(q, k, v, out):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )


def fa4():
    """FlashAttention 4 if it is installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, out: flash_attn_func(q, k, v)


def check(seqlen, symbols, config=None):
    """Largest error of one head, and torch's, against fp32; cached rows untouched."""
    q, k, v = inputs(seqlen)[0]
    out = torch.full_like(q, 7.0)
    ours(symbols, config)(q, k, v, out)
    head = random.randrange(HEADS)
    part = slice(head, head + 1)
    one = None
    if symbols is not None:
        one = Symbols(symbols.q_bits[:, part], symbols.kv_bits[:, part], symbols.grid)
    exact = torch.full((1, seqlen, 1, HEAD_DIM), 7.0, device=DEVICE)
    parts = [x[:, :, part] for x in (q, k, v)]
    sparse_attention(*(x.float() for x in parts), one, out=exact, backend="reference")
    error = (out[:, :, part].float() - exact).abs().max().item()
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in parts)
    ).transpose(1, 2)
    truth = torch.empty_like(exact)
    sparse_attention(*(x.float() for x in parts), out=truth, backend="reference")
    torch_error = (dense.float() - truth).abs().max().item()
    # Fewer keys make larger outputs: the error may grow with them.
    limit = 2 * torch_error * max(1.0, (exact.abs().max() / truth.abs().max()).item())
    assert error <= limit, f"off by {error:.2e}, allowed {limit:.2e}"
    return error


def density_of(symbols):
    return 1.0 if symbols is None else symbols.density().item()


class Timer:
    """One candidate, captured over rotating inputs."""

    def __init__(self, name, run, sets, symbols=None):
        self.name, self.density = name, density_of(symbols)
        out = self.out = torch.zeros_like(sets[0][0])  # the graph writes to it
        for q, k, v in sets:
            run(q, k, v, out)
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for q, k, v in sets:
            run(q, k, v, out)
        stop.record()
        torch.cuda.synchronize()
        once = start.elapsed_time(stop) / len(sets)
        self.calls = len(sets) * max(1, round(ROUND_MS / max(once, 0.01) / len(sets)))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(self.calls):
                run(*sets[i % len(sets)], out)
        self.times = []

    def sample(self):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        torch.cuda.synchronize()
        self.times.append(start.elapsed_time(stop) / self.calls)

    @property
    def ms(self):
        return statistics.median(self.times)


def measure(candidates, rounds, deadline):
    for number in range(rounds + 1):
        for timer in random.sample(candidates, len(candidates)):
            timer.sample()
        if number == 0:  # the first round warms the card
            for timer in candidates:
                timer.times.clear()
        elif number >= 3 and time.monotonic() > deadline:
            break


def guarded(title, part, *args):
    try:
        return part(*args)
    except Exception:
        print(f"--- {title} FAILED\n{traceback.format_exc(limit=4)}", flush=True)
        return None


def add(found, name, run, sets, symbols=None):
    timer = guarded(name, Timer, name, run, sets, symbols)
    if timer is not None:
        found[name] = timer


def table(seqlen, found, dense_name):
    flop = 4 * seqlen * seqlen * HEADS * HEAD_DIM
    dense, baseline = found.get(dense_name), found.get("cudnn")
    print(f"S={seqlen}    {'':18} density      ms   TFLOP/s  linear  vs cudnn   min..max ms")
    for timer in found.values():
        rate = flop * timer.density / timer.ms / 1e9
        linear = timer.density * dense.ms / timer.ms if dense else float("nan")
        versus = baseline.ms / timer.ms if baseline else float("nan")
        print(
            f"  {timer.name:27} {timer.density:7.3f} {timer.ms:8.4f} {rate:8.0f} {linear:8.3f} "
            f"{versus:8.3f}   {min(timer.times):.4f}..{max(timer.times):.4f}"
        )
    ones = found.get("ones")
    if dense and ones:
        print(f"  all-ones symbols cost {100 * (ones.ms / dense.ms - 1):+.2f} % over dense")
    print(flush=True)


def one_size(seqlen, rounds, deadline):
    symbols = {"ones": Symbols.dense(Grid(seqlen, seqlen), 1, HEADS, DEVICE)}
    symbols |= {f"density {d}": random_bits(seqlen, d) for d in DENSITIES}
    symbols["half q cached, half kv"] = random_bits(seqlen, 0.5, 0.5)
    for name, bits in {"dense": None, **symbols}.items():
        error = guarded(f"check of {name} at {seqlen}", check, seqlen, bits)
        if error is None:
            return
        print(f"  check {seqlen:6} {name:24} error {error:.1e} ok", flush=True)
    sets = inputs(seqlen)
    found = {}
    add(found, "cudnn", cudnn, sets)
    other = fa4()
    if other is not None:
        add(found, "fa4", other, sets)
    add(found, "dense", ours(None), sets)
    for name, bits in symbols.items():
        add(found, name, ours(bits), sets, bits)
    measure(list(found.values()), rounds, deadline)
    table(seqlen, found, "dense")


def variants(seqlen, rounds, deadline):
    """The chosen configuration beside its neighbours."""
    base = attention_sm90.choose_config(HEAD_DIM, 128)
    replace = dataclasses.replace
    configs = {
        "chosen": base,
        "k_stages 3" if base.k_stages == 2 else "k_stages 2": replace(
            base, k_stages=5 - base.k_stages
        ),
        "queries in shared memory": replace(base, q_in_registers=False),
        "queries there, 216": replace(base, q_in_registers=False, registers=(216, 72)),
        "registers 232": replace(base, registers=(232, 40)),
        "order not overlapped": replace(base, overlapped=False),
    }
    sets = inputs(seqlen)
    for density in (None, 0.25, 0.1):
        bits = None if density is None else random_bits(seqlen, density)
        found = {}
        for name, config in configs.items():
            if bits is None and name == "order not overlapped":
                continue
            title = f"{name}, {density or 'dense'}"
            if guarded(title, check, seqlen, bits, config) is not None:
                add(found, title, ours(bits, config), sets, bits)
        measure(list(found.values()), rounds, deadline)
        table(seqlen, found, f"chosen, {density or 'dense'}")


def launch_cost():
    """Host time of an eager call: what remains of it if nothing waits."""
    q, k, v = (torch.randn(1, 256, 2, 128, device=DEVICE).bfloat16() for _ in range(3))
    bits = random_bits(256, 0.5, heads=2)
    out = torch.empty_like(q)
    for name, symbols in (("dense", None), ("sparse", bits)):
        for _ in range(20):
            sparse_attention(q, k, v, symbols, out=out, backend="sm90")
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            sparse_attention(q, k, v, symbols, out=out, backend="sm90")
        each = (time.perf_counter() - start) / 200
        torch.cuda.synchronize()
        print(f"host time of a {name} call: {1e6 * each:.0f} us")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", action="store_true", help="neighbouring configurations")
    options = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    start = time.monotonic()
    print(torch.cuda.get_device_name(DEVICE), "torch", torch.__version__)
    print("config", attention_sm90.choose_config(HEAD_DIM, 128), flush=True)
    if options.variants:
        for number, seqlen in enumerate(SEQLENS[:2]):
            deadline = start + options.seconds * (number + 1) / 2
            guarded(f"variants at {seqlen}", variants, seqlen, options.rounds, deadline)
    else:
        guarded("launch cost", launch_cost)
        for number, seqlen in enumerate(SEQLENS):
            deadline = start + options.seconds * (number + 1) / len(SEQLENS)
            guarded(f"S={seqlen}", one_size, seqlen, options.rounds, deadline)
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
