"""Pictures about a run: sample sheets and the loss curve."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

SHEET_PROMPTS = 8


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] or [B, 3, F, H, W] in [-1, 1] to [B, H, W, 3] or [B, F, H, W, 3] bytes."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return bytes_.movedim(1, -1).numpy()


def save_sheet(
    pictures: np.ndarray,
    path: Path,
    columns: int = 4,
    frames: int = 8,
    prompts: list[str] | None = None,
    width: int | None = None,
) -> None:
    """A grid of pictures [B, H, W, 3], or one row of frames for each clip [B, F, H, W, 3]."""
    if pictures.ndim == 5:
        picks = np.linspace(0, pictures.shape[1] - 1, frames).round().astype(int)
        pictures = pictures[:, picks].reshape(-1, *pictures.shape[2:])
        columns = frames
    tiles = [Image.fromarray(p) for p in pictures]
    if width:
        tiles = [t.resize((width, width), Image.Resampling.LANCZOS) for t in tiles]
    w, h = tiles[0].size
    span = columns if prompts and len(prompts) * columns == len(tiles) else 1  # tiles per prompt
    texts = [textwrap.fill(p, max(8, int(w * span / 6.2))) for p in prompts or []]
    caption = 4 + 12 * max(t.count("\n") + 1 for t in texts) if texts else 0
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * w, rows * (h + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = i % columns * w, i // columns * (h + caption)
        sheet.paste(tile, (x, y + caption))
        if texts and i % span == 0:
            draw.text((x + 3, y + 1), texts[i // span], fill="black", spacing=1)
    sheet.quantize(256).save(path, optimize=True)  # a palette: a third of the bytes


def loss_curve(log: list[dict], path: Path) -> None:
    """Training loss over time, one colour for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for stage in sorted({row["stage"] for row in log}):
        rows = [row for row in log if row["stage"] == stage]
        axes.plot([r["minutes"] for r in rows], [r["loss"] for r in rows], label=f"stage {stage}")
    axes.set(xlabel="minutes of flow training", ylabel="loss (mean of 100 steps)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def generate(
    pipe, note: dict, prompts: list[str], seed: int = 0, batch: int = 8, **extra
) -> np.ndarray:
    """Pictures or clips as bytes from a stock pipeline; one generator for each prompt."""
    out = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        gens = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(group))]
        result = pipe(group, generator=gens, output_type="pt", **(note["call"] | extra))
        video = hasattr(result, "frames")
        pixels = result.frames.transpose(1, 2) if video else result.images
        out.append(to_uint8(pixels * 2 - 1))
    return np.concatenate(out)


def pipeline_sheet(folder: Path, path: Path, device: str) -> None:
    """The sample sheet of a saved pipeline: its held-out prompts, through the stock call."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    note = json.loads((Path(folder) / "flashomni.json").read_text())
    prompts = note["prompts"][:SHEET_PROMPTS]
    pictures = generate(pipe, note, prompts)
    save_sheet(
        pictures,
        path,
        columns=4,
        frames=8,
        prompts=prompts,
        width=80 if pictures.ndim == 5 else 176,
    )
