"""Pictures and videos as sheets that a page can hold: bounded in pixels and in bytes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from flashomni.page.viewer import Sheet

FRAMES = 64
PIXELS = 16_000_000  # of a sheet: phones refuse much more
SIDE = 16_383  # of a WebP
BYTES = 3 << 20  # of a sheet
QUALITIES = (95, 88, 78, 65, 50)


def images(pixels: Tensor) -> list[Image.Image]:
    """The frames of ``[F, 3, H, W]`` in [0, 1]; values that are not finite are black."""
    array = pixels.nan_to_num(0.0, 0.0, 0.0).permute(0, 2, 3, 1).mul(255).round()
    return [Image.fromarray(frame) for frame in array.numpy().astype(np.uint8)]


def picked(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` frames, evenly, the first and the last among them."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def sheets(results: Mapping[str, Tensor], most: int | None = None) -> dict[str, Sheet]:
    """Each as a sheet of one grid: all frames, or 64 of them.

    A picture is kept exactly where that fits; what is too large is compressed, then scaled.

    Args:
        results: ``[F, 3, H, W]`` in [0, 1], all of one shape.
        most: bytes of a sheet; ``BYTES`` if left out.
    """
    most = BYTES if most is None else most
    first = next(iter(results.values()))
    total, _, height, width = first.shape
    frames = picked(total, FRAMES)
    columns = math.ceil(math.sqrt(len(frames) * height / width))
    columns = max(1, min(columns, len(frames)))
    rows = math.ceil(len(frames) / columns)
    scale = min(
        1.0,
        math.sqrt(PIXELS / (columns * rows * width * height)),
        SIDE / (columns * width),
        SIDE / (rows * height),
    )
    size = max(1, int(width * scale)), max(1, int(height * scale))
    found = {}
    for name, pixels in results.items():
        sheet = Image.new("RGB", (columns * size[0], rows * size[1]))
        for place, image in enumerate(images(pixels[frames])):
            image = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(image, (place % columns * size[0], place // columns * size[1]))
        uri = f"data:image/webp;base64,{base64.b64encode(_encoded(sheet, most)).decode()}"
        found[name] = Sheet(uri, *size, len(frames), columns, rows)
    return found


def _encoded(sheet: Image.Image, most: int) -> bytes:
    if sheet.width * sheet.height <= PIXELS / 4:
        exact = _webp(sheet, lossless=True)
        if len(exact) <= most:
            return exact
    for quality in QUALITIES:
        content = _webp(sheet, quality=quality)
        if len(content) <= most:
            break
    # Noise does not compress; the frames keep their places.
    while len(content) > most and max(sheet.size) > 1:
        sheet = sheet.resize((max(1, sheet.width // 2), max(1, sheet.height // 2)))
        content = _webp(sheet, quality=QUALITIES[-1])
    return content


def _webp(sheet: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, format="WEBP", **options)
    return buffer.getvalue()
