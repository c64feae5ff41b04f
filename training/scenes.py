"""Captioned synthetic scenes: vocabulary, layouts, motions, sampling and captions.

A batch of scenes is a :class:`Scenes`: plain tensors, one row per scene, up to ``MAX_OBJECTS``
objects each. ``training.render`` turns it into pictures or clips, ``captions`` into text. The
colours of the objects in one scene are distinct, so a caption names each object unambiguously.

Held-out split: every colour has one shape (``HELD_OUT``) with which it never appears in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

MAX_OBJECTS = 4
SHAPES = ("circle", "square", "triangle", "ring", "star", "cross", "heart", "moon")
COLOURS = {
    "red": (0.88, 0.10, 0.10),
    "orange": (0.96, 0.50, 0.05),
    "yellow": (0.95, 0.86, 0.10),
    "green": (0.12, 0.66, 0.18),
    "cyan": (0.05, 0.76, 0.80),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.52, 0.15, 0.82),
    "pink": (0.97, 0.28, 0.66),
}
# Floors are muted on purpose: objects stand out by saturation, which multiplicative light keeps.
FLOORS = {
    "grey": (0.62, 0.62, 0.62),
    "white": (0.92, 0.92, 0.91),
    "black": (0.17, 0.17, 0.18),
    "brown": (0.58, 0.49, 0.41),
    "green": (0.53, 0.63, 0.53),
    "blue": (0.53, 0.59, 0.69),
}
SIZES = ("small", "", "large")
RADII = ((0.085, 0.105), (0.125, 0.150), (0.180, 0.210))
TEXTURES = ("", "striped", "dotted", "checkered")
PATTERNS = ("", "checker", "striped", "tiled")
MOTIONS = (
    "resting",
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "spinning",
)
REST, LEFT, RIGHT, UP, DOWN, BOUNCE, SPIN = range(7)
# Held-out pair per colour: an affine map visits every shape once, so no shape is favoured.
HELD_OUT = tuple((3 * i + 1) % len(SHAPES) for i in range(len(COLOURS)))


@dataclass(frozen=True)
class Layout:
    """Where objects stand, how far sizes shrink to fit, and the sentence that says so."""

    slots: tuple[tuple[float, float], ...]
    scale: float
    phrases: tuple[str, ...]
    motions: tuple[int, ...] = (REST,)
    weight: float = 1.0  # how often it is drawn
    large: float = 0.0  # how often in large clips, on top of that


IMAGE_LAYOUTS = (
    Layout(((0.5, 0.5),), 1.0, ("{0} in the centre",), weight=0.5),
    Layout(((0.27, 0.5),), 1.0, ("{0} on the left",), weight=0.4),
    Layout(((0.73, 0.5),), 1.0, ("{0} on the right",), weight=0.4),
    Layout(((0.5, 0.27),), 1.0, ("{0} at the top",), weight=0.4),
    Layout(((0.5, 0.73),), 1.0, ("{0} at the bottom",), weight=0.4),
    Layout(((0.28, 0.5), (0.72, 0.5)), 0.92, ("{0} left of {1}", "{1} right of {0}"), weight=1.6),
    Layout(((0.5, 0.28), (0.5, 0.72)), 0.92, ("{0} above {1}", "{1} below {0}"), weight=1.6),
    Layout(((0.2, 0.5), (0.5, 0.5), (0.8, 0.5)), 0.66, ("{0}, {1} and {2} in a row",)),
    Layout(
        ((0.5, 0.28), (0.28, 0.72), (0.72, 0.72)),
        0.88,
        ("{0} above {1} and {2}", "{1} and {2} below {0}"),
    ),
    Layout(
        ((0.28, 0.28), (0.72, 0.28), (0.5, 0.72)),
        0.88,
        ("{0} and {1} above {2}", "{2} below {0} and {1}"),
    ),
    Layout(
        ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
        0.88,
        ("{0} and {1} above {2} and {3}", "{2} and {3} below {0} and {1}"),
        weight=1.2,
    ),
)
_ACROSS = (REST, LEFT, RIGHT, LEFT, RIGHT, SPIN)
_ALONG = (REST, UP, DOWN, UP, DOWN, BOUNCE, BOUNCE, SPIN)
VIDEO_LAYOUTS = (
    Layout(((0.5, 0.5),), 1.0, ("{0}",), (REST, LEFT, RIGHT, UP, DOWN, BOUNCE, SPIN), 1.2),
    Layout(((0.5, 0.28), (0.5, 0.72)), 0.92, ("{0} above {1}", "{1} below {0}"), _ACROSS),
    Layout(((0.28, 0.5), (0.72, 0.5)), 0.92, ("{0} left of {1}", "{1} right of {0}"), _ALONG),
    # The first object crosses behind the second one, which is drawn later.
    Layout(((0.5, 0.5), (0.5, 0.5)), 1.0, ("{0} behind {1}",), (LEFT, RIGHT), 0.8),
    Layout(((0.5, 0.2), (0.5, 0.5), (0.5, 0.8)), 0.66, ("{0} above {1} above {2}",), _ACROSS, 0.7),
    # Objects too small for 128 x 128 pixels.
    Layout(
        ((0.5, 0.14), (0.5, 0.38), (0.5, 0.62), (0.5, 0.86)),
        0.5,
        ("{0} above {1} above {2} above {3}",),
        _ACROSS,
        0.0,
        0.7,
    ),
    Layout(
        ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
        0.55,
        ("{0} and {1} above {2} and {3}", "{2} and {3} below {0} and {1}"),
        (REST, BOUNCE, SPIN),
        0.0,
        0.7,
    ),
)
BEHIND = 3  # index in VIDEO_LAYOUTS


@dataclass
class Scenes:
    """A batch of B scenes with K = MAX_OBJECTS object slots; unused slots have radius 0.

    Positions are fractions of the picture, x right and y down; angles in radians.
    """

    layout: torch.Tensor  # [B] index into the layouts of its kind
    flip: torch.Tensor  # [B] which of the layout's phrases says it
    count: torch.Tensor  # [B]
    shape: torch.Tensor  # [B, K]
    colour: torch.Tensor  # [B, K]
    size: torch.Tensor  # [B, K]
    texture: torch.Tensor  # [B, K]
    shiny: torch.Tensor  # [B, K] 0 or 1
    motion: torch.Tensor  # [B, K] index into MOTIONS
    radius: torch.Tensor  # [B, K]
    angle: torch.Tensor  # [B, K]
    start: torch.Tensor  # [B, K, 2]
    stop: torch.Tensor  # [B, K, 2]
    bounce: torch.Tensor  # [B, K] number of hops
    spin: torch.Tensor  # [B, K] radians turned in the whole clip
    floor: torch.Tensor  # [B]
    pattern: torch.Tensor  # [B]
    phase: torch.Tensor  # [B, 2] shift of the floor pattern
    light: torch.Tensor  # [B, 2] direction of the light times its strength
    video: bool = False

    def __len__(self) -> int:
        return self.count.shape[0]

    def _map(self, fn) -> Scenes:
        return Scenes(
            **{
                f.name: fn(getattr(self, f.name)) if f.name != "video" else self.video
                for f in fields(self)
            }
        )

    def to(self, device) -> Scenes:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def __getitem__(self, index) -> Scenes:
        if isinstance(index, int):
            index = slice(index, index + 1)
        return self._map(lambda t: t[index])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "video"}

    def layouts(self) -> tuple[Layout, ...]:
        return VIDEO_LAYOUTS if self.video else IMAGE_LAYOUTS


def _pick(n: int, shape: tuple[int, ...], gen: torch.Generator) -> torch.Tensor:
    return torch.randint(n, shape, generator=gen)


def _rand(shape: tuple[int, ...], gen: torch.Generator, lo: float, hi: float) -> torch.Tensor:
    return lo + (hi - lo) * torch.rand(shape, generator=gen)


def sample(
    n: int,
    gen: torch.Generator,
    video: bool = False,
    split: str = "train",
    large: bool = False,
) -> Scenes:
    """Draw ``n`` scenes. ``split``: "train" (no held-out pair) or "heldout" (at least one each).

    ``large`` adds the layouts whose objects only a large clip resolves.
    """
    k, table = MAX_OBJECTS, VIDEO_LAYOUTS if video else IMAGE_LAYOUTS
    weights = torch.tensor([entry.weight + large * entry.large for entry in table])
    layout = torch.multinomial(weights, n, replacement=True, generator=gen)
    counts = torch.tensor([len(entry.slots) for entry in table])
    slots = torch.zeros(len(table), k, 2)
    for i, entry in enumerate(table):
        slots[i, : len(entry.slots)] = torch.tensor(entry.slots)
    count = counts[layout]
    present = torch.arange(k) < count[:, None]

    colour = torch.rand((n, len(COLOURS)), generator=gen).argsort(1)[:, :k]
    shape = _pick(len(SHAPES), (n, k), gen)
    held = torch.tensor(HELD_OUT)[colour]
    other = (held + 1 + _pick(len(SHAPES) - 1, (n, k), gen)) % len(SHAPES)
    shape = torch.where(shape == held, other, shape)
    if split == "heldout":
        chosen = (torch.rand(n, generator=gen) * count).long()[:, None] == torch.arange(k)
        shape = torch.where(chosen, held, shape)

    size = _pick(3, (n, k), gen)
    lo, hi = (torch.tensor(RADII)[size, i] for i in (0, 1))
    scale = torch.tensor([entry.scale for entry in table])[layout]
    radius = (lo + (hi - lo) * torch.rand((n, k), generator=gen)) * scale[:, None] * present
    home = slots[layout] + _rand((n, k, 2), gen, -0.025, 0.025)
    home = home + _rand((n, 1, 2), gen, -0.02, 0.02)
    angle = _rand((n, k), gen, -0.26, 0.26)
    light = _rand((n,), gen, 0.0, 2 * math.pi)
    scenes = Scenes(
        layout=layout,
        flip=torch.rand(n, generator=gen),
        count=count,
        shape=shape,
        colour=colour,
        size=size,
        texture=_pick(len(TEXTURES), (n, k), gen) * _pick(2, (n, k), gen),
        shiny=(torch.rand((n, k), generator=gen) < 0.3).long(),
        motion=torch.zeros(n, k).long(),
        radius=radius,
        angle=angle,
        start=home,
        stop=home.clone(),
        bounce=torch.zeros(n, k),
        spin=torch.zeros(n, k),
        floor=_pick(len(FLOORS), (n,), gen),
        pattern=_pick(len(PATTERNS), (n,), gen),
        phase=torch.rand((n, 2), generator=gen),
        light=torch.stack([light.cos(), light.sin()], 1) * _rand((n, 1), gen, 0.5, 1.0),
        video=video,
    )
    phrases = torch.tensor([len(entry.phrases) for entry in table])[layout]
    scenes.flip = (scenes.flip * phrases).long()
    return _animate(scenes, gen) if video else scenes


def _animate(scenes: Scenes, gen: torch.Generator) -> Scenes:
    """Give every object a motion that its layout allows, and the path that goes with it."""
    n, k = scenes.shape.shape
    options = max(len(entry.motions) for entry in VIDEO_LAYOUTS)
    table = torch.tensor(
        [[entry.motions[i % len(entry.motions)] for i in range(840)] for entry in VIDEO_LAYOUTS]
    )  # 840: a multiple of every list length
    assert all(840 % len(entry.motions) == 0 for entry in VIDEO_LAYOUTS), options
    motion = table[scenes.layout[:, None], _pick(840, (n, k), gen)]
    # In a crossing the front object stays where it is; it may turn.
    behind = (scenes.layout == BEHIND)[:, None] & (torch.arange(k) == 1)
    motion = torch.where(behind, torch.where(_pick(2, (n, k), gen) == 1, SPIN, REST), motion)
    # Nobody sees a disc or a ring turn.
    round_shape = (scenes.shape == SHAPES.index("circle")) | (scenes.shape == SHAPES.index("ring"))
    motion = torch.where((motion == SPIN) & round_shape, REST, motion)

    heading = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1], [0, 0], [0, 0]])
    reach = _rand((n, k, 1), gen, 0.20, 0.28)
    half = heading[motion] * reach
    half[:, 0] = torch.where((scenes.layout == BEHIND)[:, None], half[:, 0] * 1.15, half[:, 0])
    scenes.motion = motion
    scenes.start, scenes.stop = scenes.start - half, scenes.stop + half
    scenes.bounce = torch.where(motion == BOUNCE, _pick(2, (n, k), gen) + 2.0, 0.0)
    turn = _rand((n, k), gen, 0.7, 1.1) * 2 * math.pi
    sign = 2.0 * _pick(2, (n, k), gen) - 1
    scenes.spin = torch.where(motion == SPIN, turn * sign, 0.0)
    return scenes


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def captions(scenes: Scenes) -> list[str]:
    """One sentence for each scene: objects, sizes, materials, relation, motion, floor."""
    colours, floors, table = tuple(COLOURS), tuple(FLOORS), scenes.layouts()
    rows = {name: t.tolist() for name, t in scenes.tensors().items()}
    out = []
    for b in range(len(scenes)):
        names = []
        for i in range(rows["count"][b]):
            words = (
                SIZES[rows["size"][b][i]],
                "shiny" if rows["shiny"][b][i] else "",
                colours[rows["colour"][b][i]],
                TEXTURES[rows["texture"][b][i]],
                SHAPES[rows["shape"][b][i]],
            )
            name = _article(" ".join(w for w in words if w))
            names.append(f"{name} {MOTIONS[rows['motion'][b][i]]}" if scenes.video else name)
        phrase = table[rows["layout"][b]].phrases[rows["flip"][b]].format(*names)
        pattern = PATTERNS[rows["pattern"][b]]
        floor = " ".join(w for w in (floors[rows["floor"][b]], pattern, "floor") if w)
        out.append(f"{phrase} on {_article(floor)}")
    return out


def words() -> list[str]:
    """Every word a caption can hold, sorted: the corpus of the tokenizers."""
    phrases = [p for entry in IMAGE_LAYOUTS + VIDEO_LAYOUTS for p in entry.phrases]
    text = " ".join(
        (
            *SHAPES,
            *COLOURS,
            *FLOORS,
            *SIZES,
            *TEXTURES,
            *PATTERNS,
            *MOTIONS,
            *phrases,
            "a an on floor shiny",
        )
    )
    for mark in "{},0123456789":
        text = text.replace(mark, " ")
    return sorted(set(text.split()))
