"""The geometry of vision tokens, of what models get for their position embeddings."""

from __future__ import annotations

from typing import Any

import torch

from flashomni.engine.geometry import Geometry, Shape


def of_position_ids(ids: Any, name: str = "img_ids") -> Geometry:
    """Of a table of positions, as FLUX's models take it: kind or index of the image, row, column.

    FLUX.2 has a fourth axis, which is the same for all tokens of an image.

    Tokens of the first token's kind are generated, what follows are references. Reads the values:
    once a generation, and only for policies that ask for it.

    Args:
        ids: ``[S, 3 or 4]``, or ``[B, S, 3 or 4]``, one for each item of the batch.
        name: of the model's argument, for the reason where there is no shape.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim not in (2, 3) or ids.shape[-1] not in (3, 4):
        return Geometry(why=f"{name} is no table of positions [S, 3 or 4]")
    table = (ids if ids.ndim == 2 else ids[0]).detach().to("cpu", torch.float64)
    others = (table[:, 0] != table[0, 0]).nonzero()
    count = int(others[0]) if len(others) else len(table)
    place, rest = (table[:count, 1:] - table[0, 1:]).split([2, ids.shape[-1] - 3], dim=1)
    height, width = (int(size) + 1 for size in place[-1].tolist())
    raster = torch.cartesian_prod(torch.arange(max(height, 0)), torch.arange(max(width, 0)))
    fits = height > 0 and width > 0 and len(raster) == count and not rest.any()
    if not fits or not torch.equal(place, raster.double()):
        return Geometry(why=f"{name} does not number the rows and columns of one image in order")
    return Geometry((1, height, width), len(table) - count)


def of_image_shapes(shapes: Any, name: str = "img_shapes") -> Geometry:
    """Of lists of ``(T, H, W)``, one for each item of the batch, as Qwen-Image takes them."""
    try:
        items = {tuple(_images(item)) for item in shapes}
        (images,) = items
    except (TypeError, ValueError):
        return Geometry(why=f"{name} is not one list of (T, H, W) for the whole batch")
    return Geometry.of_images(images)


def _images(item: Any) -> list[Shape]:
    """The images of one item: a list of shapes, or one shape."""
    given = item if isinstance(item, list) else [item]
    return [(frames, height, width) for frames, height, width in given]
