"""Pictures and videos as files."""

from __future__ import annotations

import io
from typing import Any

TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
FRAMES_PER_SECOND = 12


def encode(frames: list[Any], kind: str, fps: int = FRAMES_PER_SECOND) -> bytes:
    """A file of a picture, or of a video: an animation.

    Args:
        frames: ``PIL.Image`` each; one for a picture.
        kind: ``png``, ``webp`` or ``jpeg``; several frames need ``webp``.
        fps: frames a second.
    """
    file = io.BytesIO()
    options: dict[str, Any] = {}
    if len(frames) > 1:
        times = {"duration": round(1000 / fps), "loop": 0}
        options = {"save_all": True, "append_images": frames[1:], "quality": 90, **times}
    elif kind == "png":
        options = {"compress_level": 1}  # of 9: the default's bytes are few less, its time is twice
    elif kind == "webp":
        options = {"lossless": True}
    else:
        options = {"quality": 95}
    frames[0].save(file, kind.upper(), **options)
    return file.getvalue()
