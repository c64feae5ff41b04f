"""The page of a comparison: pictures with a slider between them, and how the methods did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from flashomni.lab.fidelity.comparison import Comparison, Rivalry, Summed
from flashomni.lab.fidelity.methods import DENSE
from flashomni.lab.media import FRAMES_PER_SECOND
from flashomni.lab.sheets import BYTES, sheets
from flashomni.page import document, escaped, fold, section, table, warnings
from flashomni.page.viewer import Sheet, viewer
from flashomni.util.files import write_text

PROMPTS = 3  # that pictures are shown of
ALL_BYTES = 24 << 20  # of the page's pictures
FILE = "compare.html"
COLUMNS = (
    "method", "seconds", "speed-up", "PSNR, dB", "worst", "SSIM", "FLOPs skipped",
    "steps computed", "scores",
)  # fmt: skip


class Shown:
    """Keeps what a page shows: the first seed's pictures of the first prompts.

    To be given to :func:`flashomni.lab.fidelity.compare.compare` as ``on_picture``.

    Args:
        methods: how many there will be: the page's bytes are divided among them.
        prompts: how many of the first prompts; 0 keeps nothing.
    """

    def __init__(self, methods: int, prompts: int = PROMPTS) -> None:
        self._most = min(BYTES, ALL_BYTES // (max(prompts, 1) * (methods + 1)))
        self._prompts = prompts
        self._seed: int | None = None
        self.frames = 1
        self.sheets: dict[int, dict[str, Sheet]] = {}  # by prompt, then by method

    def __call__(
        self, method: str, prompt: int, seed: int, reference: Tensor, pixels: Tensor
    ) -> None:
        self._seed = seed if self._seed is None else self._seed
        if seed != self._seed or prompt >= self._prompts:
            return
        self.frames = len(pixels)
        kept = self.sheets.setdefault(prompt, {})
        if not kept:
            kept.update(sheets({DENSE: reference.cpu()}, self._most))
        kept.update(sheets({method: pixels.cpu()}, self._most))


def write_page(
    found: Comparison,
    shown: Shown,
    out: str | Path,
    *,
    model: str,
    prompts: Sequence[str],
    rivals: Sequence[str],
    methods: Sequence[str],
    command: str,
    versions: Mapping[str, str],
) -> Path:
    """Write ``compare.html`` into a folder: one file that loads nothing.

    Args:
        found: what the methods did.
        shown: their pictures.
        out: the folder.
        model: what was asked for.
        prompts: all that were generated.
        rivals: names of those that methods are held against.
        methods: names of the others.
        command: that does it again.
        versions: of what took part.

    Returns:
        The path of the page.

    Raises:
        OSError: it cannot be written; an older page is untouched.
    """
    seeds = max((row.seeds for row in found.rows), default=0)
    today = datetime.now(UTC).date().isoformat()
    body = (
        f'<header class="fo-brand"><b>FlashOmni</b><span>{today}</span></header>'
        f"<h1>{escaped(model)} <span>\N{MIDDLE DOT} {len(found.rows)} methods</span></h1>"
        f'<p class="fo-prompt">{_times(len(prompts), "prompt")}, {_times(seeds, "seed")} each, '
        f"against the stock pipeline with the same noise; {_times(found.seconds, 'second')}</p>"
        + warnings(_notes(found))
        + section("Pictures", _pictures(shown, prompts))
        + section(
            "Methods",
            _table(found.rows),
            "Means over pictures, with the standard error over prompts. Seconds are of one picture "
            "or video, the whole call.",
        )
        + section(
            "At equal time",
            table(
                ("method", "best rival", "seconds", "rival's", "dB", "worst"),
                map(_rivalry, found.equal_time(rivals, methods)),
            ) if found.equal_time(rivals, methods) else "<p>No rival is as fast as a method.</p>",
            "Each method against the best rival that takes at most 3 % longer: the difference of "
            "PSNR picture by picture, its mean and its lowest.",
        )
        + section(
            "To do it again",
            f"<pre>{escaped(command)}</pre>"
            + fold("Prompts", f"<ol>{''.join(f'<li>{escaped(x)}</li>' for x in prompts)}</ol>")
            + fold("Versions", table((), versions.items())),
        )
    )  # fmt: skip
    return write_text(Path(out) / FILE, document(f"{model}, methods compared", body))


def _times(count: float, what: str) -> str:
    return f"{count:.0f} {what}{'' if round(count) == 1 else 's'}"


def _notes(found: Comparison) -> list[str]:
    broken = [row.method for row in found.rows if row.psnr_db == "not finite"]
    notes = [f"{name} has no fidelity: values of a picture are not finite" for name in broken]
    if found.left_out:
        notes.append(f"there was no time for {', '.join(found.left_out)}")
    return notes


def _pictures(shown: Shown, prompts: Sequence[str]) -> str:
    parts = []
    for prompt, found in sorted(shown.sheets.items()):
        dense = found[DENSE]
        others = {name: sheet for name, sheet in found.items() if name != DENSE}
        rate = FRAMES_PER_SECOND * dense.frames / shown.frames
        seen = viewer(dense, others, {}, {}, rate)
        parts.append(f"<div><h3>{escaped(prompts[prompt])}</h3>{seen}</div>")
    return f'<div class="fo-several">{"".join(parts)}</div>' if parts else ""


def _table(rows: Sequence[Summed]) -> str:
    """Without the columns that nobody asked for."""
    lines = [COLUMNS, _dense(rows), *map(_row, rows)]
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    head, *body = zip(*kept, strict=True)
    return table(head, body) if rows else ""


def _dense(rows: Sequence[Summed]) -> tuple[str, ...]:
    known = [row.dense_seconds for row in rows if math.isfinite(row.dense_seconds)]
    seconds = f"{sum(known) / len(known):.3f}" if known else ""
    return ("stock pipeline", seconds, "1.00x", *[""] * (len(COLUMNS) - 3))


def _row(row: Summed) -> tuple[str, ...]:
    error = "" if row.psnr_error == "" else f" \N{PLUS-MINUS SIGN} {row.psnr_error}"
    skipped = "" if row.flops_skipped == "" else f"{row.flops_skipped:.1%}"
    return (
        row.method, f"{row.seconds:.3f}", f"{row.speedup:.2f}x", f"{row.psnr_db}{error}",
        str(row.worst_psnr_db), str(row.ssim), skipped, str(row.computed), row.measures,
    )  # fmt: skip


def _rivalry(each: Rivalry) -> tuple[str, ...]:
    error = "" if each.error_db is None else f" \N{PLUS-MINUS SIGN} {each.error_db}"
    return (
        each.method, each.rival, f"{each.seconds:.3f}", f"{each.rival_seconds:.3f}",
        f"{each.gain_db:+}{error}", f"{each.worst_db:+}",
    )  # fmt: skip
