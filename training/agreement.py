"""Does a picture show what its caption says? The caption alone is enough: the grammar is parsed.

``agreement(pixels, prompt) -> (right, all)`` is a scorer for ``flashomni eval --scorer
training.agreement:agreement``: it counts the statements of ``score.COUNTED``.
"""

from __future__ import annotations

import re

import torch

from training import scenes, score

NOUN = (
    rf"(?:an? )(?P<size>small|large|)\s?(?P<shiny>shiny|)\s?(?P<colour>{'|'.join(scenes.COLOURS)})"
    rf"\s?(?P<texture>{'|'.join(t for t in scenes.TEXTURES if t)}|)"
    rf" (?P<shape>{'|'.join(scenes.SHAPES)})"
    rf"(?: (?P<motion>{'|'.join(scenes.MOTIONS)}))?"
)
OBJECT = re.compile(NOUN)
ANY_OBJECT = re.sub(r"\?P<\w+>", "?:", NOUN)


def parse(caption: str) -> scenes.Scenes:
    """The scene that a caption describes, as a batch of one.

    What a caption does not say (exact sizes, positions inside a layout) keeps its default.

    Raises:
        ValueError: the grammar cannot make this sentence.
    """
    text, on, floor = caption.rpartition(" on a")
    objects = [match.groupdict() for match in OBJECT.finditer(text)]
    video = any(found["motion"] for found in objects)
    table = scenes.VIDEO_LAYOUTS if video else scenes.IMAGE_LAYOUTS
    for index, layout in enumerate(table):
        for flip, phrase in enumerate(layout.phrases):
            order = [int(slot) for slot in re.findall(r"\{(\d)\}", phrase)]
            shape = re.sub(r"\\\{\d\\\}", lambda _: ANY_OBJECT, re.escape(phrase))
            if on and floor and len(order) == len(objects) and re.fullmatch(shape, text):
                return _scene(index, flip, [objects[order.index(i)] for i in sorted(order)], video)
    raise ValueError(f"caption must come from the grammar of training/scenes.py, got {caption!r}")


def _scene(layout: int, flip: int, objects: list[dict], video: bool) -> scenes.Scenes:
    batch = scenes.sample(1, torch.Generator().manual_seed(0), video)
    batch.layout[0], batch.flip[0], batch.count[0] = layout, flip, len(objects)
    for i, found in enumerate(objects):
        batch.colour[0, i] = tuple(scenes.COLOURS).index(found["colour"])
        batch.shape[0, i] = scenes.SHAPES.index(found["shape"])
        if video:
            batch.motion[0, i] = scenes.MOTIONS.index(found["motion"])
    return batch


def agreement(pixels: torch.Tensor, prompt: str) -> tuple[int, int]:
    """Right and all statements about colour, shape and motion that the checker can read.

    Args:
        pixels: fp32 ``[F, 3, H, W]`` in [0, 1]; F = 1 for a picture.
        prompt: a caption of the grammar.

    Raises:
        ValueError: the prompt is not one.
    """
    frames = (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()
    truth = parse(prompt)
    counted = [
        right
        for kind, right in score.statements(frames if truth.video else frames[0], truth)
        if kind in score.COUNTED
    ]
    return sum(counted), len(counted)
