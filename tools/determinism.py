"""How far a picture is from itself: run again, as CUDA graphs, in a batch, compiled.

    python tools/determinism.py --dtype bfloat16 [--size 128] [--recipe balanced ...]

A row a recipe, on the trained tiny-image: whether two runs, and runs with CUDA graphs and without,
have the same bits; and the distance of the first picture of a batch of four to the same alone, the
largest of pixels in [0, 1] and in dB, beside the stock pipeline's own. docs/determinism.md says
what to expect.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import flashomni
from flashomni.lab import zoo

RECIPES = ("balanced", "taylorseer", "flashomni:tau_q=.5,tau_kv=.4,interval=3,degrade_below=0",
           "spargeattn:mass=.6", "easycache")  # fmt: skip
BATCH = 4
SAME = "same bits"


def distance(a: Tensor, b: Tensor) -> str:
    """The largest difference, and PSNR."""
    if torch.equal(a, b):
        return SAME
    mse = float((a - b).square().mean())
    return f"{float((a - b).abs().max()):.0e}, {-10 * math.log10(mse):.1f} dB"


class Maker:
    """Makes pictures of the same prompts and seeds.

    Args:
        told: the command line's.
    """

    def __init__(self, told: argparse.Namespace) -> None:
        loaded = zoo.load("tiny-image", told.device, getattr(torch, told.dtype))
        self.pipe, self.prompts = loaded.pipe, loaded.prompts
        self.pipe.set_progress_bar_config(disable=True)
        size = {} if told.size is None else {"height": told.size, "width": told.size}
        self._call = {**loaded.call, **size}

    def pictures(self, count: int) -> Tensor:
        """fp32 ``[B, 3, H, W]`` in [0, 1]."""
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        seeds = [torch.Generator().manual_seed(i) for i in range(count)]
        made = self.pipe(prompts, generator=seeds, output_type="pt", **self._call)
        return made.images.float()

    def row(self, recipe: str) -> list[str]:
        """Of one recipe."""
        with flashomni.accelerate(self.pipe, recipe, graphs=False) as engine:
            first, again = self.pictures(1), self.pictures(1)
            skipped = f"{engine.report().flops_skipped:.0%}"
            batch = self.pictures(BATCH)[:1]
            redone = any("again" in note for note in engine.report().notes)
        with flashomni.accelerate(self.pipe, recipe, graphs=True) as engine:
            graphs = [distance(self.pictures(1), first) for _ in range(4)]  # the third replays
            none = any("no CUDA graphs" in note for note in engine.report().notes)
        worst = next((found for found in graphs if found != SAME), SAME)
        recorded = "none" if none or self.pipe.device.type != "cuda" else worst
        words = [distance(again, first), recorded, distance(batch, first), skipped]
        return [recipe, *words, "yes" if redone else "no"]

    def compiled(self, backend: str) -> str:
        """``balanced``, compiled after it was put on, to the same eager."""
        with flashomni.accelerate(self.pipe, "balanced", graphs=False):
            eager, model = self.pictures(1), self.pipe.transformer
            torch._dynamo.reset()
            self.pipe.transformer = torch.compile(model, backend=backend)
            try:
                return distance(self.pictures(1), eager)
            finally:
                self.pipe.transformer = model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--size", type=int, help="of pictures; the model's own if left out")
    parser.add_argument("--recipe", action="append", help="may be repeated")
    parser.add_argument("--compile", action="append", default=[], metavar="BACKEND")
    told = parser.parse_args()
    maker = Maker(told)
    print("| recipe | again | CUDA graphs | in a batch of four | skipped | tiles done again |")
    print("|---|---|---|---|---|---|")
    one = maker.pictures(1)
    batch = distance(maker.pictures(BATCH)[:1], one)
    print(f"| stock | {distance(maker.pictures(1), one)} | | {batch} | | |", flush=True)
    for recipe in told.recipe or RECIPES:
        print(f"| {' | '.join(maker.row(recipe))} |", flush=True)
    for backend in told.compile:
        print(f"balanced compiled by {backend}: {maker.compiled(backend)}", flush=True)


if __name__ == "__main__":
    main()
