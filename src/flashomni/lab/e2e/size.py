"""What a model generates, and of which size it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model and what it generates.

    Args:
        family: which pipeline: ``models._FAMILIES``.
        config: of the transformer; of each, where there are two.
        text: tokens of the text.
        valid: of these, tokens that are not padding (FLUX attends to its padding).
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        frames: of the video.
        note: what is not as published.
        patch: pixels of a token, along each side.
        chunk: frames of a token, behind the first frame.
        joint: whether the text is in the sequence that attends to itself.
    """

    family: str
    config: Mapping[str, Any]
    text: int
    valid: int
    height: int
    width: int
    frames: int = 1
    note: str = ""
    patch: int = 16
    chunk: int = 4
    joint: bool = True

    @property
    def tokens(self) -> int:
        """Length of the sequence that attends to itself, padding included."""
        latent_frames = (self.frames - 1) // self.chunk + 1
        text = self.text if self.joint else 0
        return latent_frames * (self.height // self.patch) * (self.width // self.patch) + text
