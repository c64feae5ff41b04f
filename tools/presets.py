"""The presets' schedules: chosen on the ``tune`` prompts, reported on the ``report`` prompts.

``python tools/presets.py --model tiny-image --part tune --recipe NAME ...`` prints, for each
recipe, the PSNR to the dense picture (mean, standard error, worst) and the share of FLOPs skipped,
and writes them to ``--csv``, a row for each prompt and seed.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from flashomni.lab import metrics, split, zoo
from flashomni.lab.generation import Generation
from flashomni.lab.versions import versions

COLUMNS = ("model", "part", "recipe", "prompt", "seed", "psnr_db", "flops_skipped", "computed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-image")
    parser.add_argument("--part", default="tune", choices=split.PARTS)
    parser.add_argument("--recipe", nargs="+", default=["quality", "balanced", "fast"])
    parser.add_argument("--count", type=int, help="prompts; all of the part by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()

    loaded = zoo.load(options.model, options.device)
    prompts = split.pick(options.model, loaded.prompts, options.part, options.count)
    rows: list[tuple] = []
    for number, prompt in enumerate(prompts):
        for seed in range(options.seeds):
            job = Generation(loaded, prompt, seed, options.steps)
            dense, _, _ = job.dense(lambda *_: None)
            for recipe in options.recipe:
                pixels, _, summary = job.accelerated(recipe, lambda *_: None)
                kinds = [step["kind"] for step in summary.steps]
                computed = len(kinds) - kinds.count("dispatch")
                decibel = min(metrics.psnr(dense, pixels), 120.0)
                rows.append((options.model, options.part, recipe, number, seed, decibel,
                             summary.flops_skipped, computed))  # fmt: skip
        print(f"{number + 1} of {len(prompts)} prompts", flush=True)
    if options.csv is not None:
        origin = versions(torch.device(options.device))
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow((*COLUMNS, *origin))
            writer.writerows((*row, *origin.values()) for row in rows)
    print(f"{options.model}, {options.part} prompts: {len(prompts)} x {options.seeds} seeds")
    for recipe in options.recipe:
        own = [row for row in rows if row[2] == recipe]
        values = [row[5] for row in own]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        skipped = statistics.mean(row[6] for row in own)
        print(
            f"{statistics.mean(values):6.2f} +- {error:4.2f} dB, worst {min(values):6.2f}, "
            f"{skipped:6.1%} skipped, {own[0][7]:2d} computed  {recipe}"
        )


if __name__ == "__main__":
    main()
