"""Does a picture show what its caption says? A checker made of classical vision only.

Objects are the saturated pixels, named by the nearest palette hue; a shape is the best overlap of
the object's silhouette with rendered templates; relations and motions come from centres of mass.
``python training/score.py --model FOLDER --count 64`` prints the agreement on held-out captions,
next to two controls: rendered ground truth (must be near 1) and shuffled captions (chance).
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from scipy import ndimage

from training import render, scenes

GRID = 40
HUES = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in scenes.COLOURS.values()])
MOVES = {scenes.LEFT: (-1, 0), scenes.RIGHT: (1, 0), scenes.UP: (0, -1), scenes.DOWN: (0, 1)}
# What counts for ``score``: colour and shape of every object, and its motion in a clip.
COUNTED = ("colour", "shape", "motion")


@cache
def _templates(video: bool) -> np.ndarray:
    """Silhouettes [shapes, angles, GRID * GRID]; objects in pictures are only tilted a little."""
    angles = torch.linspace(0, 2 * np.pi, 49)[:-1] if video else torch.linspace(-0.32, 0.32, 9)
    return render.templates(GRID, angles).flatten(2).numpy()


def colour_labels(picture: np.ndarray) -> np.ndarray:
    """Palette index of every pixel of a [H, W, 3] byte picture, -1 where it is unsaturated."""
    rgb = picture.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    r, g, b = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = (
        np.select(
            [high == r, high == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4
        )
        / 6
    )
    gap = np.abs(hue[..., None] - HUES)
    label = np.minimum(gap, 1 - gap).argmin(-1)
    return np.where((chroma > 0.42 * high) & (chroma > 0.1), label, -1)


def find_blob(labels: np.ndarray, colour: int) -> dict | None:
    """The largest object of one colour: mask, area (fraction of the picture), centre (x, y)."""
    mask = ndimage.binary_closing(np.pad(labels == colour, 2), np.ones((3, 3)))[2:-2, 2:-2]
    if labels.shape[0] >= 192:
        mask = ndimage.binary_opening(mask, np.ones((3, 3)))
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    if not count:
        return None
    areas = np.bincount(parts.ravel())[1:]
    mask = parts == areas.argmax() + 1
    # A glint leaves a small hole; a ring's hole is large and stays.
    holes, count = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    if count:
        small = np.bincount(holes.ravel()) < 0.12 * mask.sum()
        small[0] = False
        mask = mask | small[holes]
    area = mask.sum() / mask.size
    if area < 0.0025:
        return None
    y, x = ndimage.center_of_mass(mask)
    height, width = mask.shape
    return {"mask": mask, "area": area, "x": (x + 0.5) / width, "y": (y + 0.5) / height}


def silhouette(blob: dict) -> np.ndarray:
    """The blob's mask about its centre, scaled to unit area: [GRID * GRID] bool."""
    mask = blob["mask"].astype(np.float32)
    half = np.sqrt(mask.sum()) * render.UNIT_SPAN
    line = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * half
    rows = blob["y"] * mask.shape[0] - 0.5 + line
    cols = blob["x"] * mask.shape[1] - 0.5 + line
    grid = np.meshgrid(rows, cols, indexing="ij")
    return (ndimage.map_coordinates(mask, grid, order=1) > 0.5).ravel()


def shape_overlap(shadow: np.ndarray, video: bool) -> np.ndarray:
    """Intersection over union with each shape [shapes], at the best angle."""
    table = _templates(video)
    both, either = (table & shadow).sum(-1), (table | shadow).sum(-1)
    return (both / np.maximum(either, 1)).max(1)


def read_clip(clip: np.ndarray, colour: int) -> dict | None:
    """Track one colour through a clip [F, H, W, 3]: shape votes, path, turning."""
    frames = np.linspace(0, len(clip) - 1, 17).round().astype(int)
    blobs = [find_blob(colour_labels(clip[f]), colour) for f in frames]
    seen = [b for b in blobs if b is not None]
    if len(seen) < len(frames) // 2:
        return None
    full = 0.8 * np.median([b["area"] for b in seen])
    whole = [b for b in seen if b["area"] >= full]
    shadows = [silhouette(b) for b in whole]
    votes = np.mean([shape_overlap(s, True) for s in shadows], 0)
    path = np.array([(b["x"], b["y"]) for b in seen])
    # Widen the first silhouette to tell turning from noise: overlap with it drops when turning.
    same = [(s & shadows[0]).sum() / max((s | shadows[0]).sum(), 1) for s in shadows]
    dx, dy = path[-2:].mean(0) - path[:2].mean(0)
    swing = np.diff(np.sign(np.diff(ndimage.uniform_filter1d(path[:, 1], 2))))
    if np.ptp(path[:, 1]) > 0.12 and abs(dx) < 0.12 and (np.abs(swing) > 1).sum() >= 2:
        motion = scenes.BOUNCE
    elif max(abs(dx), abs(dy)) > 0.12:
        motion = next(
            m for m, (hx, hy) in MOVES.items() if (hx * dx > abs(dy)) or (hy * dy > abs(dx))
        )
    else:
        motion = scenes.SPIN if np.quantile(same, 0.25) < 0.8 else scenes.REST
    return {
        "shape": int(votes.argmax()),
        "motion": motion,
        "x": float(path[:, 0].mean()),
        "y": float(path[:, 1].mean()),
    }


def read_picture(picture: np.ndarray, colour: int) -> dict | None:
    blob = find_blob(colour_labels(picture), colour)
    if blob is None:
        return None
    overlap = shape_overlap(silhouette(blob), False)
    return {"shape": int(overlap.argmax()), "x": blob["x"], "y": blob["y"]}


def statements(picture: np.ndarray, scene: scenes.Scenes) -> list[tuple[str, bool]]:
    """Every statement of one scene's caption that the checker can read, with its truth.

    ``picture`` is [H, W, 3] bytes, or [F, H, W, 3] for a clip; ``scene`` holds one scene.
    """
    video, out, found = scene.video, [], []
    for i in range(int(scene.count[0])):
        colour, shape = int(scene.colour[0, i]), int(scene.shape[0, i])
        seen = (read_clip if video else read_picture)(picture, colour)
        found.append(seen)
        right = seen is not None and seen["shape"] == shape
        out += [("colour", seen is not None), ("shape", right)]
        if shape == scenes.HELD_OUT[colour]:
            out.append(("held-out pair", right))
        if video:
            motion = int(scene.motion[0, i])
            out.append(("motion", seen is not None and seen["motion"] == motion))
    slots = scene.layouts()[int(scene.layout[0])].slots
    for i, first in enumerate(slots):
        for j, second in enumerate(slots[:i]):
            for axis, name in enumerate("xy"):
                if abs(first[axis] - second[axis]) > 0.25:
                    a, b = found[i], found[j]
                    right = a is not None and b is not None
                    right = right and (a[name] > b[name]) == (first[axis] > second[axis])
                    out.append(("relation", right))
    return out


def tally(pictures: np.ndarray, batch: scenes.Scenes) -> dict[str, float]:
    """Share of true statements by kind over a batch, and "score" over those of COUNTED."""
    counts = defaultdict(lambda: [0, 0])
    for i, picture in enumerate(pictures):
        for kind, right in statements(picture, batch[i]):
            for name in (kind, *(["score"] if kind in COUNTED else [])):
                counts[name][0] += right
                counts[name][1] += 1
    return {name: right / total for name, (right, total) in sorted(counts.items())}


def score(images: np.ndarray, batch: scenes.Scenes) -> float:
    """Caption agreement in [0, 1] of byte pictures [B, H, W, 3] or clips [B, F, H, W, 3]."""
    return tally(images, batch)["score"]


def heldout_scenes(count: int, video: bool, seed: int = 1234) -> scenes.Scenes:
    return scenes.sample(count, torch.Generator().manual_seed(seed), video, "heldout")


def shuffled(batch: scenes.Scenes) -> scenes.Scenes:
    """The control: every picture is judged by the next scene's caption."""
    return batch[torch.arange(1, len(batch) + 1) % len(batch)]


def truth(batch: scenes.Scenes, size: int, frames: int, detail: float = 1.0) -> np.ndarray:
    """Rendered pictures or clips (with finer ``detail``) of the scenes themselves, as bytes."""
    from training.sheets import to_uint8

    if not batch.video:
        return np.concatenate(
            [
                to_uint8(render.render_images(batch[slice(i, i + 8)], size))
                for i in range(0, len(batch), 8)
            ]
        )
    times = torch.linspace(0, 1, frames)
    return np.concatenate(
        [
            to_uint8(render.render_clips(batch[i], size, times, detail=detail))
            for i in range(len(batch))
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="pipeline folder with flashomni.json")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--truth-only", action="store_true", help="only check the checker")
    args = parser.parse_args()
    note = json.loads((Path(args.model) / "flashomni.json").read_text())
    call = note["call"]
    frames = call.get("num_frames", 1)
    batch = heldout_scenes(args.count, frames > 1, args.seed)
    real = truth(batch, call["height"], frames)
    result = {"truth": tally(real, batch), "truth shuffled": tally(real, shuffled(batch))}
    if not args.truth_only:
        from diffusers import DiffusionPipeline

        from training.sheets import generate

        pipe = DiffusionPipeline.from_pretrained(args.model, local_files_only=True)
        pipe = pipe.to(args.device)
        pipe.set_progress_bar_config(disable=True)
        made = generate(pipe, note, scenes.captions(batch), args.seed, args.batch)
        result |= {"model": tally(made, batch), "model shuffled": tally(made, shuffled(batch))}
    names = sorted({name for row in result.values() for name in row})
    print(
        f"{args.count} held-out captions, seed {args.seed}, "
        f"{call['num_inference_steps']} steps, {args.device}"
    )
    print(f"{'':16}" + "".join(f"{name:>15}" for name in names))
    for title, row in result.items():
        print(f"{title:16}" + "".join(f"{row.get(name, float('nan')):15.3f}" for name in names))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
