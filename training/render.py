"""Renders a batch of scenes with signed distance functions: vectorised, anti-aliased, no files.

Every shape is a signed distance function in the object's own frame (unit radius, y up), so edges
are anti-aliased at any resolution by the distance in pixels. Light, shadow and texture multiply the
base colour, which keeps hue and saturation: that is what ``training.score`` reads afterwards.
"""

from __future__ import annotations

import math

import torch

from training.scenes import COLOURS, FLOORS, SHAPES, Scenes


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Five points: fold the plane into half of one point, then a single edge bounds it."""
    sector = 2 * math.pi / 5
    turn = torch.atan2(x, y)
    turn = (turn - sector * torch.round(turn / sector)).abs()
    length = torch.sqrt(x * x + y * y + 1e-9)
    fx, fy = length * torch.sin(turn), length * torch.cos(turn)
    inner, outer = 0.45, 1.05
    ex, ey = inner * math.sin(sector / 2), inner * math.cos(sector / 2) - outer
    norm = math.hypot(ex, ey)
    return (fx * -ey + (fy - outer) * ex) / norm


def shape_distance(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Signed distance to each of SHAPES at (x, y), in units of the object's radius."""
    ax, ay, length = x.abs(), y.abs(), torch.sqrt(x * x + y * y + 1e-9)
    root = math.sqrt(0.5)
    edge = math.sqrt(3) / 2
    ty = y + 0.12  # the triangle's and the heart's centres of mass sit at the origin
    hx, hy = x / 1.1, (y + 0.02) / 1.1
    lobe = torch.sqrt((hx.abs() - 0.354) ** 2 + (hy - 0.354) ** 2 + 1e-9) - 0.5
    diamond = torch.maximum(((hx + hy) * root).abs(), ((hy - hx) * root).abs()) - 0.5
    bite = torch.sqrt((x - 0.52) ** 2 + (y - 0.14) ** 2 + 1e-9)
    return [
        length - 0.90,
        torch.maximum(ax, ay) - 0.80,
        torch.maximum(edge * ax + 0.5 * ty, -ty) - 0.55,
        (length - 0.70).abs() - 0.23,
        _star(x, y),
        torch.minimum(torch.maximum(ax - 0.27, ay - 0.92), torch.maximum(ax - 0.92, ay - 0.27)),
        torch.minimum(lobe, diamond) * 1.1,
        torch.maximum(length - 0.95, 0.80 - bite),
    ]


def _distance(kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the shape that ``kind`` [N, 1, 1] names; x, y are [N, H, W]."""
    result = None
    for i, d in enumerate(shape_distance(x, y)):
        result = d if result is None else torch.where(kind == i, d, result)
    return result


def _wave(x: torch.Tensor, period: float, pixels: torch.Tensor) -> torch.Tensor:
    """Anti-aliased square wave in [-1, 1]; ``pixels`` is how many pixels one unit of x spans."""
    slope = period * pixels / (2 * math.pi)
    return (torch.sin(x * (2 * math.pi / period)) * slope * 1.5).clamp(-1, 1)


def _smooth(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _floor(
    scenes: Scenes, gx: torch.Tensor, gy: torch.Tensor, size: int, detail: float
) -> torch.Tensor:
    """Floor colour [N, 3, H, W]; ``detail`` divides the periods of its pattern."""
    base = torch.tensor(list(FLOORS.values()), device=gx.device)[scenes.floor]
    px, py = (scenes.phase[:, i, None, None] for i in (0, 1))
    kind = scenes.pattern[:, None, None]
    pixels = torch.tensor(float(size), device=gx.device)
    check, stripe, edge = 0.25 / detail, 0.16 / detail, 0.2 / detail
    checker = _wave(gx + px, check, pixels) * _wave(gy + py, check, pixels)
    stripes = _wave(gx + gy * 0.5 + px, stripe, pixels).expand_as(checker)
    cell = [
        ((g + p) / edge - torch.round((g + p) / edge)).abs() * edge for g, p in ((gx, px), (gy, py))
    ]
    tile = 1 - 2 * ((torch.minimum(*cell) - 0.006 / detail) * size).clamp(0, 1)
    mark = torch.where(kind == 1, checker, torch.where(kind == 2, stripes, tile))
    shade = torch.where(kind == 0, torch.ones_like(mark), 1 - 0.11 * (1 + mark))
    return base[:, :, None, None] * shade[:, None]


def _layer(
    image: torch.Tensor,
    centre: torch.Tensor,
    angle: torch.Tensor,
    radius: torch.Tensor,
    look: torch.Tensor,
    colour: torch.Tensor,
    light: torch.Tensor,
    detail: float = 1.0,
) -> torch.Tensor:
    """Draw one object and its shadow over ``image`` [N, 3, H, H].

    centre [N, 2], angle [N], radius [N] (0: nothing to draw), look [N, 3] = shape, texture and
    shininess, colour [N, 3], light [N, 2]; ``detail`` divides the periods of the texture.
    """
    size = image.shape[-1]
    axis = (torch.arange(size, device=image.device, dtype=torch.float32) + 0.5) / size
    gx, gy = axis[None, None, :], axis[None, :, None]
    kind, texture, shiny = (look[:, j, None, None] for j in range(3))
    lx, ly = (light[:, j, None, None] for j in range(2))
    r, present = radius[:, None, None].clamp_min(1e-4), (radius[:, None, None] > 0).float()
    cos, sin = angle[:, None, None].cos(), angle[:, None, None].sin()
    dx, dy = (gx - centre[:, 0, None, None]) / r, (gy - centre[:, 1, None, None]) / r

    sx, sy = dx + 0.28 * lx, dy + 0.28 * ly  # the shadow falls away from the light
    shadow = _distance(kind, cos * sx + sin * sy, sin * sx - cos * sy)
    image = image * (1 - 0.5 * present * _smooth(0.5 - shadow / 0.5))[:, None]

    x, y = cos * dx + sin * dy, sin * dx - cos * dy
    pixels = r * size
    cover = (0.5 - _distance(kind, x, y) * pixels).clamp(0, 1) * present
    stripe, pitch, check = 0.42 / detail, 0.5 / detail, 0.7 / detail
    dots = torch.sqrt(
        (x - pitch * torch.round(x / pitch)) ** 2 + (y - pitch * torch.round(y / pitch)) ** 2 + 1e-9
    )
    mark = torch.where(
        texture == 1,
        _wave(x + 0.5 * y, stripe, pixels),
        torch.where(
            texture == 2,
            ((0.15 / detail - dots) * pixels * 2).clamp(-1, 1),
            _wave(x, check, pixels) * _wave(y, check, pixels),
        ),
    )
    tone = torch.where(texture == 0, torch.ones_like(mark), 1 - 0.24 * (1 + mark))
    tone = tone * (1 + shiny * 0.16 * (lx * dx + ly * dy))
    glint = shiny * 0.75 * torch.exp(-((dx - 0.4 * lx) ** 2 + (dy - 0.4 * ly) ** 2) / 0.06)
    paint = colour[:, :, None, None] * tone[:, None]
    paint = paint + (1 - paint) * glint[:, None]
    return image + (paint - image) * cover[:, None]


def _paint(
    scenes: Scenes,
    centre: torch.Tensor,
    angle: torch.Tensor,
    size: int,
    layer=_layer,
    detail: float = 1.0,
) -> torch.Tensor:
    """Pictures [N, 3, size, size] in [-1, 1] of N scenes with objects at ``centre`` [N, K, 2]."""
    axis = (torch.arange(size, device=centre.device, dtype=torch.float32) + 0.5) / size
    gx, gy = axis[None, None, :], axis[None, :, None]
    image = _floor(scenes, gx, gy, size, detail)
    palette = torch.tensor(list(COLOURS.values()), device=centre.device)
    look = torch.stack([scenes.shape, scenes.texture, scenes.shiny], -1)
    for i in range(int(scenes.count.max())):  # slots that no scene uses cost nothing
        image = layer(
            image,
            centre[:, i],
            angle[:, i],
            scenes.radius[:, i],
            look[:, i],
            palette[scenes.colour[:, i]],
            scenes.light,
            detail,
        )
    lx, ly = (scenes.light[:, i, None, None] for i in (0, 1))
    gradient = 1 + 0.22 * (lx * (gx - 0.5) + ly * (gy - 0.5))
    return (image * gradient[:, None]).clamp(0, 1) * 2 - 1


def poses(scenes: Scenes, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres [B, F, K, 2] and angles [B, F, K] at ``times`` [F] in [0, 1]."""
    t = times[None, :, None]
    along = t[..., None]
    centre = scenes.start[:, None] * (1 - along) + scenes.stop[:, None] * along
    hops = scenes.bounce[:, None]
    height = torch.where(hops > 0, 0.16 - 0.32 * torch.sin(math.pi * hops * t).abs(), 0.0)
    centre = torch.stack([centre[..., 0], centre[..., 1] + height], -1)
    return centre, scenes.angle[:, None] + scenes.spin[:, None] * t


def render_images(scenes: Scenes, size: int, layer=_layer) -> torch.Tensor:
    """Pictures [B, 3, size, size] in [-1, 1] at the start of each scene."""
    centre, angle = poses(scenes, torch.zeros(1, device=scenes.radius.device))
    return _paint(scenes, centre[:, 0], angle[:, 0], size, layer)


def render_clips(
    scenes: Scenes, size: int, times: torch.Tensor, layer=_layer, detail: float = 1.0
) -> torch.Tensor:
    """Clips [B, 3, F, size, size] in [-1, 1] at ``times`` [F].

    ``detail`` makes patterns and textures that many times finer: ``size / 128`` keeps their periods
    in pixels, which smaller clips could not show.
    """
    frames = times.shape[0]
    centre, angle = (p.flatten(0, 1) for p in poses(scenes, times.to(scenes.radius.device)))
    spread = scenes._map(lambda t: t.repeat_interleave(frames, 0))
    flat = _paint(spread, centre, angle, size, layer, detail)
    return flat.unflatten(0, (len(scenes), frames)).transpose(1, 2)


def templates(grid: int, angles: torch.Tensor) -> torch.Tensor:
    """Silhouettes [len(SHAPES), A, grid, grid] of unit area about their centre of mass."""
    axis = (torch.arange(512) + 0.5) / 256 - 1
    x, y = 1.3 * axis[None, :], -1.3 * axis[:, None]
    out = []
    for distance in shape_distance(*torch.broadcast_tensors(x, y)):
        inside = (distance < 0).float()
        area = inside.sum() * (2.6 / 512) ** 2
        cx, cy = ((c.expand(512, 512) * inside).sum() / inside.sum() for c in (x, y))
        line = ((torch.arange(grid) + 0.5) / grid * 2 - 1) * UNIT_SPAN * area.sqrt()
        u, v = line[None, None, :], -line[None, :, None]
        cos, sin = angles[:, None, None].cos(), angles[:, None, None].sin()
        px, py = cx + cos * u - sin * v, cy + sin * u + cos * v
        out.append(_distance(torch.tensor(len(out)), px, py) < 0)
    return torch.stack(out)


UNIT_SPAN = 1.25  # half width of a template's window, in units of the square root of the area
assert len(SHAPES) == 8
