"""Two pictures or videos of one size, to compare: a slider between them, side by side, or apart.

All frames of a video lie in one sheet, so that both sides show the same one whatever the browser is
busy with: a frame is a place in the sheet, not a file to decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flashomni.page import escaped


@dataclass(frozen=True)
class Sheet:
    """Frames in one picture, row by row.

    Attributes:
        uri: of the picture, ``data:image/...``.
        width: of a frame, in pixels, like ``height``.
        frames: how many there are; 1 for a picture.
        columns: of the sheet, like ``rows``.
    """

    uri: str
    width: int
    height: int
    frames: int = 1
    columns: int = 1
    rows: int = 1


def viewer(
    dense: Sheet,
    accelerated: Sheet | Mapping[str, Sheet],
    apart: Mapping[str, Sheet],
    notes: Mapping[str, str],
    frames_per_second: float,
) -> str:
    """The two, with a slider, and whatever shows their difference behind buttons.

    Args:
        dense: of the stock pipeline.
        accelerated: the same, accelerated; or several to choose from, by their names.
        apart: other views by the name of their button: sheets of the same grid.
        notes: a sentence below each of those.
        frames_per_second: of a video.
    """
    modes = ["Slider", "Side by side", *apart]
    buttons = "".join(
        f'<button type=button data-mode="{i}" aria-pressed="{"true" if i == 0 else "false"}">'
        f"{escaped(name)}</button>"
        for i, name in enumerate(modes)
    )
    several = {"Accelerated": accelerated} if isinstance(accelerated, Sheet) else accelerated
    fast = "".join(
        f'<figure class="fo-fast">{_frame(sheet, f"{name.lower()} result")}'
        f"<figcaption>{escaped(name)}</figcaption></figure>"
        for name, sheet in several.items()
    )
    views = "".join(
        f'<figure class="fo-apart" data-view="{i}">{_frame(sheet, name)}'
        f"<figcaption>{escaped(notes.get(name, name))}</figcaption></figure>"
        for i, (name, sheet) in enumerate(apart.items(), start=2)
    )
    about = (
        f"--columns:{dense.columns};--rows:{dense.rows};--ratio:{dense.width / dense.height:.5f};"
        f"--native:{dense.width}px"
    )
    return (
        f'<div class="fo-viewer" style="{about}" data-frames="{dense.frames}" '
        f'data-columns="{dense.columns}" data-rate="{frames_per_second:g}">'
        f'<div class="fo-modes" role=group aria-label="View">{buttons}</div>{_choice(several)}'
        '<div class="fo-stage"><div class="fo-pair">'
        f'<figure class="fo-dense">{_frame(dense, "dense result")}'
        "<figcaption>Dense</figcaption></figure>"
        f"{fast}"
        '<i class="fo-handle" aria-hidden=true></i>'
        '<input class="fo-slider" type=range min=0 max=100 step=1 value=50 '
        'aria-label="Where dense ends and accelerated begins">'
        f"</div>{views}{_player(dense.frames)}</div></div>"
    )


def _frame(sheet: Sheet, what: str) -> str:
    return f'<div class="fo-frame"><img src="{escaped(sheet.uri)}" alt="{escaped(what)}"></div>'


def _choice(names: Iterable[str]) -> str:
    """Which of several is seen; a script shows it, without one all are."""
    options = "".join(f"<option>{escaped(name)}</option>" for name in names)
    if options.count("<option>") < 2:
        return ""
    return f'<select class="fo-pick" aria-label="Method">{options}</select>'


def _player(frames: int) -> str:
    if frames == 1:
        return ""
    return (
        '<div class="fo-player"><button type=button class="fo-play" aria-label="Play">▶</button>'
        f'<input class="fo-scrub" type=range min=0 max={frames - 1} step=1 value=0 '
        f'aria-label="Frame"><output>1 / {frames}</output></div>'
    )
