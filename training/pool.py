"""Encoded clips of one rung, batched by the length of their captions.

Clips of a batch have equally long captions, cut to that length: nothing is padded. Where padding
is part of the model, ``alike=False`` takes any clips, uncut. A pool grows while it is used and
starts with few clips, so that training begins early.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from training.data import Renderer, Source, encode, stage_times
from training.ladder import Rung

GROUP_PIXELS = 8_200_000  # rendered and encoded at once: a whole clip of 352 x 352
CAPACITY = 1024


class Captions:
    """The sources of scenes that a run needs, each with its own workers."""

    def __init__(self, pipe, kind, device: str, workers: int, seed: int, chunk: int):
        self.arguments = (pipe, kind, device, workers, seed, chunk)
        self.sources: dict[tuple[bool, int], Source] = {}

    def source(self, rung: Rung) -> Source:
        key = (rung.detail > 1, rung.every)
        if key not in self.sources:
            self.sources[key] = Source(*self.arguments, large=key[0], every=key[1])
        return self.sources[key]


class ClipPool:
    """A ring of encoded clips: bf16 latents and token ids."""

    def __init__(
        self,
        source: Source,
        renderer: Renderer,
        vae,
        rung: Rung,
        capacity: int = CAPACITY,
        alike: bool = True,
    ):
        self.source, self.renderer, self.vae, self.rung = source, renderer, vae, rung
        self.times = stage_times(source.kind, rung.frames)
        group = max(1, GROUP_PIXELS // (rung.frames * rung.size**2))
        self.group = min(group, rung.first)
        self.capacity = capacity // self.group * self.group
        self.alike = alike
        self.size, self.head, self.debt = 0, 0, 0.0
        self.latents: torch.Tensor | None = None
        self.tokens: dict[str, torch.Tensor] = {}
        self.lengths: list[int] = []
        for _ in range(-(-rung.first // self.group)):
            self._fill()

    def _fill(self) -> None:
        batch, tokens = self.source.take(self.group)
        pixels = self.renderer(batch, self.rung.size, self.times, self.rung.detail)
        latents = encode(self.vae, pixels).to(torch.bfloat16)
        if self.latents is None:
            self.latents = latents.new_empty((self.capacity, *latents.shape[1:]))
            self.tokens = {k: v.new_empty((self.capacity, *v.shape[1:])) for k, v in tokens.items()}
            self.lengths = [0] * self.capacity
        span = slice(self.head, self.head + self.group)
        self.latents[span] = latents
        for key, value in tokens.items():
            self.tokens[key][span] = value
        self.lengths[span] = tokens["mask"].sum(1).tolist()
        self.head = (self.head + self.group) % self.capacity
        self.size = min(self.size + self.group, self.capacity)

    def batch(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """``count`` random clips of one caption length; renews clips as ``rung.reuse`` asks for."""
        assert self.latents is not None
        self.debt += count / self.rung.reuse
        while self.debt >= self.group:
            self._fill()
            self.debt -= self.group
        if not self.alike:
            index = torch.randperm(self.size)[:count].to(self.latents.device)
            return self.latents[index].float(), {k: v[index] for k, v in self.tokens.items()}
        alike = defaultdict(list)
        for i, length in enumerate(self.lengths[: self.size]):
            alike[length].append(i)
        length = self.lengths[int(torch.randint(self.size, ()))]
        found = torch.tensor(alike[length])
        if len(found) >= count:
            index = found[torch.randperm(len(found))[:count]]
        else:
            index = found[torch.randint(len(found), (count,))]
        index = index.to(self.latents.device)
        tokens = {k: v[index] for k, v in self.tokens.items()}
        return self.latents[index].float(), trimmed(tokens, length)


def trimmed(tokens: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Token ids without padding: "text" and "mask" [B, length]; "clip" is never padded away."""
    return tokens | {key: tokens[key][:, :length] for key in ("text", "mask")}
