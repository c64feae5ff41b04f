"""Caption scores and attention maps of video pipelines at several sizes, inside a time limit.

``python training/evaluate.py --model new=runs/long/pipeline --model shipped=FOLDER --seconds 90``:
the same held-out captions at every size, as many as fit, judged by ``training.score`` in processes
beside the GPU; "all statements" as in the model cards. Then, on rendered and noised clips, which
share of the attention mass the top quarter of the blocks of 128 keys holds, layer by layer. Clips
are made without padded text: the stock call's sums in another order.
"""

# ruff: noqa: E402 - imports take long and count
from __future__ import annotations

import time

BEGIN = time.monotonic()

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanPipeline

from training import attention, flow, render, scenes, score, sheets, tiny_models, wan_model
from training.data import encode
from training.pool import trimmed

KIND = tiny_models.VIDEO
SCENES: scenes.Scenes | None = None  # of a worker


def elapsed() -> float:
    return time.monotonic() - BEGIN


def _begin(batch: scenes.Scenes) -> None:
    global SCENES
    SCENES = batch
    torch.set_num_threads(1)


def _judge(index: int, clip: np.ndarray) -> list[tuple[str, bool]]:
    assert SCENES is not None
    return score.statements(clip, SCENES[index])


class Model:
    """A pipeline that generates and shows its attention, one caption at a time."""

    def __init__(self, folder: str, device: str, shift: float | None = None, guidance: float = 1.0):
        self.device = device
        self.pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        self.pipe.to(device)
        for part in tiny_models.modules(self.pipe).values():
            part.float()
        self.shift = shift or self.pipe.scheduler.config.shift
        transformer = self.pipe.transformer
        if isinstance(self.pipe, WanPipeline):
            self.watched = wan_model.Network(transformer)
            self.predict = self._guided(self.watched.predict, guidance)
        elif guidance != 1:
            raise ValueError(f"guidance of {folder} must be 1: it was not trained for more")
        else:
            self.watched = attention.install(transformer, attention.Unpadded())
            self.predict = flow.velocity
            flow.float_residual(transformer)

    def sigmas(self, steps: int) -> list[float] | None:
        """Noise levels where the stock call leaves them to its scheduler: Wan's does."""
        if not isinstance(self.pipe, WanPipeline):
            return None
        scheduler = type(self.pipe.scheduler).from_config(
            self.pipe.scheduler.config, shift=self.shift
        )
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.tolist()

    def _guided(self, predict: Callable, guidance: float) -> Callable:
        """``predict`` with classifier-free guidance, as WanPipeline has it; 1 is without."""
        if guidance == 1:
            return predict
        with torch.no_grad():
            blank, _ = tiny_models.encode_text(self.pipe, self.tokens(""))

        def both(pipe, kind, latents, sigma, text, *rest):
            free = predict(pipe, kind, latents, sigma, blank.expand_as(text), *rest).float()
            return free + guidance * (predict(pipe, kind, latents, sigma, text, *rest) - free)

        return both

    def tokens(self, caption: str) -> dict[str, torch.Tensor]:
        tokens = tiny_models.tokenize(self.pipe, [caption])
        tokens = trimmed(tokens, int(tokens["mask"].sum()))
        return {k: v.to(self.device) for k, v in tokens.items()}

    def clip(self, caption: str, size: int, frames: int, steps: int, seed: int) -> np.ndarray:
        """Bytes [17 or fewer frames, size, size, 3]: what the checker looks at."""
        shape = (1, 8, (frames + 3) // 4, size // 4, size // 4)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            pixels = flow.sample(
                self.pipe,
                KIND,
                shape,
                self.tokens(caption),
                self.shift,
                steps,
                seed,
                self.predict,
                self.sigmas(steps),
            )
        return sheets.to_uint8(pixels[:, :, :: max(1, (frames - 1) // 16)])[0]

    def shares(
        self, scene: scenes.Scenes, size: int, frames: int, levels: tuple[float, ...]
    ) -> dict[str, list[float]]:
        """Mass in the top quarter of blocks by layer, in raster and in tile order."""
        times = torch.linspace(0, 1, frames)
        pixels = render.render_clips(scene.to(self.device), size, times, detail=max(1, size / 128))
        latents = encode(self.pipe.vae, pixels)
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        orders = {
            name: attention.token_order(grid, tile, self.device)
            for name, tile in (("raster", 0), ("tile", 4))
        }
        found: dict[str, list[list[float]]] = {name: [] for name in orders}

        def watch(q: torch.Tensor, k: torch.Tensor, text: int) -> None:
            for name, order in orders.items():
                mass = attention.block_mass(q[0][order], k[0][order])
                found[name][-1].append(attention.top_share(mass))

        self.watched.watch = watch
        gen = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(latents.shape, generator=gen).to(self.device)
        for level in levels:
            for rows in found.values():
                rows.append([])
            sigma = flow.shifted(torch.tensor([level], device=self.device), self.shift)
            tokens = self.tokens(scenes.captions(scene)[0])
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
                text, pooled = tiny_models.encode_text(self.pipe, tokens)
                noised = (1 - sigma) * latents + sigma * noise
                self.predict(self.pipe, KIND, noised, sigma, text, pooled, tokens["mask"])
        self.watched.watch = None
        return {name: np.mean(rows, 0).tolist() for name, rows in found.items()}


def rates(judged: dict[int, list[tuple[str, bool]]]) -> dict[str, float]:
    """Shares of true statements by kind, and over the counted kinds as "all statements"."""
    tally: dict[str, list[bool]] = defaultdict(list)
    for rows in judged.values():
        for kind, right in rows:
            tally[kind].append(right)
            if kind in score.COUNTED:
                tally["all statements"].append(right)
    return {kind: float(np.mean(rights)) for kind, rights in sorted(tally.items())}


def paired(a: dict[int, list], b: dict[int, list]) -> tuple[float, float, int]:
    """Mean over common captions of a's share minus b's, its standard error, how many captions."""

    def share(rows: list[tuple[str, bool]]) -> float:
        return float(np.mean([right for kind, right in rows if kind in score.COUNTED]))

    gaps = [share(a[i]) - share(b[i]) for i in a.keys() & b.keys()]
    if not gaps:
        return float("nan"), float("nan"), 0
    return float(np.mean(gaps)), float(np.std(gaps) / max(1, len(gaps) - 1) ** 0.5), len(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER; repeatable")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 352])
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--shift", type=float, help="of the noise levels, for the scheduler's")
    parser.add_argument("--guidance", type=float, default=1.0, help="of models trained for it")
    parser.add_argument("--count", type=int, default=128, help="captions, at most")
    parser.add_argument(
        "--others", type=int, default=8, help="captions for all but the first model"
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="wall time of this process")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--sheet", help="write clips of the first model to PREFIX_SIZE.png")
    parser.add_argument("--no-maps", action="store_true", help="scores only")
    args = parser.parse_args()
    batch = score.heldout_scenes(args.count, True, args.seed)
    captions = scenes.captions(batch)
    score._templates(True)  # before the fork: made once
    pool = multiprocessing.get_context("fork").Pool(args.workers, _begin, (batch,))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    models = dict(pair.split("=", 1) for pair in args.model)
    loaded = {
        name: Model(folder, args.device, args.shift, args.guidance)
        for name, folder in models.items()
    }
    first = next(iter(loaded))
    print(f"{elapsed():6.1f} s  loaded {', '.join(loaded)}", flush=True)
    shifts = {name: model.shift for name, model in loaded.items()}
    result: dict = {
        "models": models,
        "steps": args.steps,
        "guidance": args.guidance,
        "shifts": shifts,
        "maps": {},
        "scores": {},
    }
    if not args.no_maps:
        for name, model in loaded.items():
            for size in args.sizes:
                shares = model.shares(batch[1], size, args.frames, (24 / 28, 16 / 28))
                result["maps"][f"{name} {size}"] = shares
                for order, values in shares.items():
                    listed = " ".join(f"{value:.2f}" for value in values)
                    print(f"top quarter of blocks by layer, {name} {size}, {order} order: {listed}")
        print(f"{elapsed():6.1f} s  maps", flush=True)
    pending, shown, took = {}, defaultdict(list), defaultdict(float)
    late = False
    for index in range(args.count):
        for size in args.sizes:
            for name, model in loaded.items():
                longest = max(took.values(), default=0.0)
                late = late or elapsed() + 1.5 * longest + 6 > args.seconds
                if late or (name != first and index >= args.others):
                    continue
                begin = elapsed()
                clip = model.clip(captions[index], size, args.frames, args.steps, index)
                if index:  # the first pays for what is built once
                    took[size] = max(took[size], elapsed() - begin)
                pending[name, size, index] = pool.apply_async(_judge, (index, clip))
                if name == first and index < 4:
                    shown[size].append(clip)
    print(f"{elapsed():6.1f} s  {len(pending)} clips made", flush=True)
    judged: dict[tuple[str, int], dict[int, list]] = defaultdict(dict)
    for (name, size, index), job in pending.items():
        judged[name, size][index] = job.get(timeout=60)
    pool.terminate()
    print(f"{args.steps} steps, {args.device}, {elapsed():.0f} s; same captions at every size")
    kinds = ["all statements", "colour", "shape", "motion", "relation"]
    print(
        f"{'model':>10}{'size':>6}{'clips':>7}"
        + "".join(f"{k:>16}" for k in kinds)
        + "  - smallest"
    )
    for (name, size), rows in judged.items():
        row = rates(rows)
        gap, error, common = paired(rows, judged[name, args.sizes[0]])
        result["scores"][f"{name} {size}"] = {"clips": len(rows), "gap": gap, "error": error} | row
        cells = "".join(f"{row.get(k, float('nan')):16.3f}" for k in kinds)
        print(f"{name:>10}{size:6}{len(rows):7}{cells}  {gap:+.3f} +- {error:.3f} ({common})")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.sheet:
        for size, clips in shown.items():
            sheets.save_sheet(
                np.stack(clips),
                Path(f"{args.sheet}_{size}.png"),
                frames=6,
                prompts=captions[: len(clips)],
                width=min(size, 176),
            )


if __name__ == "__main__":
    main()
