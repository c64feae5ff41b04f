"""The geometry of vision tokens, of what models get for their position embeddings; RoPE tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashomni.engine import LayerRun
from flashomni.engine.geometry import Geometry
from flashomni.kernels.common.rope import Rope
from flashomni.symbols.order import Shape


def rope_in_order(run: LayerRun, rope: Rope, start: int = 0, stream: str | None = None) -> Rope:
    """RoPE tables with their rows in the order of the tokens, of those that the block has.

    Args:
        run: of a block; its first use in a call makes them for all.
        rope: ``(cos, sin)``, ``[S, D / 2]`` each, or ``[B or 1, S, H or 1, D / 2]``.
        start: the first row of a vision token.
        stream: the token stream that they are of; ``None`` for the whole sequence.
    """
    tokens = None if run.geometry is None else run.geometry.tokens
    if tokens is not None:
        cos, sin = run.shared(tokens.tables, start, *rope)
        rope = cos, sin
    cos, sin = run.own(stream, *rope)
    return cos, sin


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
    counts = table[:, 0].unique_consecutive(return_counts=True)[1]
    shapes = [_raster(part) for part in table[:, 1:].split(counts.tolist())]
    first, count = shapes[0], int(counts[0])
    if first is None:
        return Geometry(why=f"{name} does not number the rows and columns of one image in order")
    pictures = tuple(shape for shape in shapes[1:] if shape is not None)
    return Geometry(first, len(table) - count, pictures=pictures)


def _raster(place: Tensor) -> Shape | None:
    """The shape of a picture whose tokens have these rows and columns, in raster order."""
    place, rest = (place - place[0]).split([2, place.shape[1] - 2], dim=1)
    height, width = (int(size) + 1 for size in place[-1].tolist())
    if height < 1 or width < 1 or height * width != len(place) or rest.any():
        return None
    raster = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return (1, height, width) if torch.equal(place, raster.double()) else None


def of_image_shapes(shapes: Any, name: str = "img_shapes", layered: bool = False) -> Geometry:
    """Of lists of ``(T, H, W)``, one for each item of the batch, as Qwen-Image takes them.

    Args:
        shapes: of all images of each item.
        name: of the model's argument, for the reason where there is no shape.
        layered: whether the last image is the one that is given, and those in front of it are
            layers of one size, which are generated together; otherwise the first is generated.
    """
    try:
        items = {tuple(_images(item)) for item in shapes}
        (images,) = items
    except (TypeError, ValueError):
        return Geometry(why=f"{name} is not one list of (T, H, W) for the whole batch")
    if not layered:
        return Geometry.of_images(images)
    *layers, given = images
    if not layers or len(set(layers)) > 1 or layers[0][0] != 1:
        return Geometry(why=f"{name} does not name layers of one size and an image behind them")
    return Geometry.of_images([(len(layers), *layers[0][1:]), given])


def _images(item: Any) -> list[Shape]:
    """The images of one item: a list of shapes, or one shape."""
    given = item if isinstance(item, list) else [item]
    return [(frames, height, width) for frames, height, width in given]
