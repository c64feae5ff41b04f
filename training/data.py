"""Endless training data: workers write captions and token ids, the device draws and encodes.

Nothing is read from disk. A :class:`LatentPool` keeps the newest encoded samples and hands out
random batches of them, so a sample that was costly to render and encode can serve several steps.
"""

from __future__ import annotations

import os

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training import render, scenes, tiny_models

CHUNK = 512


class CaptionStream(IterableDataset):
    """Yields chunks of scene tensors ("scene.*") and token ids ("text", "mask", "clip").

    ``large`` draws the layouts of large clips too; only captions whose number of text tokens
    ``every`` divides are kept.
    """

    def __init__(
        self, pipe, video: bool, seed: int, chunk: int, large: bool = False, every: int = 1
    ):
        self.pipe, self.video, self.seed, self.chunk = pipe, video, seed, chunk
        self.large, self.every = large, every

    def __iter__(self):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        worker = get_worker_info()
        gen = torch.Generator().manual_seed(self.seed * 1009 + (worker.id if worker else 0))
        while True:
            batch = scenes.sample(self.chunk, gen, self.video, large=self.large)
            row = {f"scene.{name}": value for name, value in batch.tensors().items()}
            row |= tiny_models.tokenize(self.pipe, scenes.captions(batch))
            keep = row["mask"].sum(1) % self.every == 0
            yield {name: value[keep] for name, value in row.items()}


class Source:
    """Slices a :class:`CaptionStream` into groups of any size, on the device."""

    def __init__(
        self,
        pipe,
        kind,
        device: str,
        workers: int,
        seed: int,
        chunk: int = CHUNK,
        large: bool = False,
        every: int = 1,
    ):
        loader = DataLoader(
            CaptionStream(pipe, kind.video, seed, chunk, large, every),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            pin_memory=device == "cuda",
        )
        self.stream, self.kind, self.device, self.rest = iter(loader), kind, device, None

    def take(self, n: int) -> tuple[scenes.Scenes, dict[str, torch.Tensor]]:
        """The next ``n`` scenes and their token ids."""
        have = 0 if self.rest is None else self.rest["text"].shape[0]
        parts = [self.rest] if have else []
        while have < n:
            parts.append(next(self.stream))
            have += parts[-1]["text"].shape[0]
        rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        self.rest = {key: value[n:] for key, value in rows.items()}
        rows = {k: v[:n].to(self.device, non_blocking=True) for k, v in rows.items()}
        drawn = {k[6:]: rows.pop(k) for k in list(rows) if k.startswith("scene.")}
        return scenes.Scenes(**drawn, video=self.kind.video), rows


class Renderer:
    """Draws scenes; on a GPU with the drawing of one object compiled to few kernels.

    Compiled once for any size: the kernel is long, and each compilation takes many seconds.
    """

    def __init__(self, compiled: bool):
        layer = render._layer
        self.layer = torch.compile(layer, dynamic=True) if compiled else layer

    def __call__(
        self, batch: scenes.Scenes, size: int, times: torch.Tensor | None, detail: float = 1.0
    ) -> torch.Tensor:
        """[B, 3, size, size], or [B, 3, F, size, size] at ``times`` [F] with finer ``detail``."""
        with torch.no_grad():
            if times is None:
                return render.render_images(batch, size, self.layer)
            return render.render_clips(batch, size, times, self.layer, detail)


def encode(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents as the stock pipelines expect them."""
    config = vae.config
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16):
        mean = vae.encode(pixels).latent_dist.mode().float()
    return (mean - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def stage_times(kind, frames: int) -> torch.Tensor | None:
    """Fewer frames show the whole motion with larger steps; one frame is the first."""
    if not kind.video:
        return None
    return torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)


class LatentPool:
    """A ring of encoded samples of one stage: latents, token ids."""

    def __init__(self, source: Source, renderer: Renderer, vae, stage, capacity: int, group: int):
        self.source, self.renderer, self.vae, self.stage = source, renderer, vae, stage
        self.capacity, self.group, self.head, self.debt = capacity, group, 0, 0.0
        self.times = stage_times(source.kind, stage.frames)
        self.latents, self.tokens = None, None
        for _ in range(capacity // group):
            self._fill()

    def _fill(self) -> None:
        batch, tokens = self.source.take(self.group)
        latents = encode(self.vae, self.renderer(batch, self.stage.size, self.times))
        if self.latents is None:
            room = (self.capacity,)
            self.latents = latents.new_empty(room + latents.shape[1:], dtype=torch.bfloat16)
            self.tokens = {k: v.new_empty(room + v.shape[1:]) for k, v in tokens.items()}
        span = slice(self.head, self.head + self.group)
        self.latents[span] = latents.to(torch.bfloat16)
        for key, value in tokens.items():
            self.tokens[key][span] = value
        self.head = (self.head + self.group) % self.capacity

    def batch(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A random batch; renews as many samples as the stage's ``reuse`` asks for."""
        self.debt += self.stage.batch / self.stage.reuse
        while self.debt >= self.group:
            self._fill()
            self.debt -= self.group
        index = torch.randint(self.capacity, (self.stage.batch,), device=self.latents.device)
        return self.latents[index].float(), {k: v[index] for k, v in self.tokens.items()}
