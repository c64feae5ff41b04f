"""Does faster attention slow the products beside it? At the power cap the clock gives it back.

The five products of a HunyuanVideo single block at 32,656 tokens, with something else between.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from flashomni.kernels import sparse_attention

TOKENS, WIDTH, HEADS = 32656, 3072, 24
QUERY = "--query-gpu=clocks.sm,power.draw.instant"


def sample(stop: threading.Event, out: list[tuple[float, float]]) -> None:
    """MHz and watts, ten times a second."""
    command = ["nvidia-smi", QUERY, "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not stop.is_set():
            clock, power = process.stdout.readline().split(",")
            out.append((float(clock), float(power)))
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="of each row")
    seconds = parser.parse_args().seconds
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x, y = torch.randn(TOKENS, WIDTH, **kind), torch.randn(TOKENS, 5 * WIDTH, **kind)
    widths = [WIDTH, WIDTH, WIDTH, 4 * WIDTH]
    layers = [(x, torch.randn(n, WIDTH, **kind) / 50, torch.zeros(n, **kind)) for n in widths]
    layers.append((y, torch.randn(WIDTH, 5 * WIDTH, **kind) / 100, torch.zeros(WIDTH, **kind)))
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, 128, **kind)
    mask = torch.ones(1, 1, 1, TOKENS, dtype=torch.bool, device="cuda")

    def masked() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)

    between: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "our attention": lambda: sparse_attention(q, k, v),
        "cuDNN's, masked": masked,
        "an idle wait": lambda: torch.cuda._sleep(30_000_000),
    }
    print(torch.cuda.get_device_name())
    for name, run in between.items():
        stop, out = threading.Event(), []
        reader = threading.Thread(target=sample, args=(stop, out))
        reader.start()
        start, products, others = time.monotonic(), [], []
        while time.monotonic() - start < seconds:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            for layer in layers:
                linear(*layer)
            marks[1].record()
            run()
            marks[2].record()
            marks[2].synchronize()
            products.append(marks[0].elapsed_time(marks[1]))
            others.append(marks[1].elapsed_time(marks[2]))
        stop.set()
        reader.join()
        clock, power = (statistics.median(each) for each in zip(*out[len(out) // 3 :], strict=True))
        print(
            f"{name:16} products {statistics.median(products):6.2f} ms, it "
            f"{statistics.median(others):6.2f} ms, {clock:.0f} MHz, {power:.0f} W"
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
