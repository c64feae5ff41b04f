"""Metrics against known values; the report complete, self-contained, escaped, all or nothing."""

import base64
import io
import json
import math
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from pages import Page
from PIL import Image
from rich.console import Console

import flashomni
from flashomni.cli._common import command_line
from flashomni.lab import metrics, report, sheets, viz
from flashomni.models import adapters
from flashomni.symbols import Grid, Symbols


@pytest.fixture(scope="module")
def summary():
    """A real one, with two branches and a cached layer."""
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    with torch.no_grad(), flashomni.accelerate(model, "topk") as engine:
        for step in range(8):
            for branch in ("cond", "uncond"):
                engine.step(step, 8, branch)
                model(**inputs)
        return engine.report()


@pytest.fixture(params=[1, 9], ids=["picture", "video"])
def comparison(request, summary):
    dense = torch.rand(request.param, 3, 32, 48)
    return report.Comparison(
        model="tiny",
        prompt="<script>alert('x')</script> & a ring",
        seed=3,
        call={"height": 32},
        dense=dense,
        accelerated=(dense + 0.01 * torch.rand_like(dense)).clamp(0, 1),
        seconds_dense=4.0,
        seconds_accelerated=2.0,
        dense_call_seconds=[0.5] * 8,
        summary=summary,
        versions={"torch": torch.__version__},
    )


def test_metrics_of_known_pictures():
    """A constant offset of 0.1 is 20 dB; equal pictures are infinite and 1."""
    picture = torch.rand(2, 3, 24, 24) * 0.5
    assert metrics.psnr(picture, picture + 0.1) == pytest.approx(20.0, abs=1e-3)
    assert metrics.psnr(picture, picture) == math.inf
    assert metrics.ssim(picture, picture) == pytest.approx(1.0)
    assert metrics.ssim(picture, torch.rand_like(picture)) < 0.5
    assert metrics.max_abs_diff(picture, picture + 0.25) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"image must be \[F, 3, H, W\]"),
        (lambda x: x[..., :8], r"image must be \[1, 3, 24, 24\]"),
        (lambda x: (x * 255).byte(), "image must be a float tensor"),
        (lambda x: x * 2 + 1, r"image must lie in \[0, 1\]"),
        (lambda x: x * float("nan"), r"image must lie in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.max_abs_diff])
def test_metrics_refuse(metric, change, message):
    """Each error names the argument and what is allowed."""
    picture = torch.rand(1, 3, 24, 24)
    with pytest.raises(ValueError, match=message):
        metric(picture, change(picture))


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.max_abs_diff])
def test_metrics_refuse_no_frames(metric):
    """Nothing to compare is a ValueError that says so."""
    with pytest.raises(ValueError, match=r"reference must not be empty, got \[0, 3, 24, 24\]"):
        metric(torch.rand(0, 3, 24, 24), torch.rand(0, 3, 24, 24))


def test_ssim_refuses_tiny_pictures():
    """Smaller than its window: refused, not crashed."""
    with pytest.raises(ValueError, match="at least 11 x 11 pixels for SSIM, got 8 x 24"):
        metrics.ssim(torch.rand(1, 3, 8, 24), torch.rand(1, 3, 8, 24))


def test_json(comparison):
    """The promised keys, true figures, no NaN or infinity, also for equal pictures."""
    data = report.to_json(comparison)
    assert {
        "model", "recipe", "seconds_dense", "seconds_accelerated", "speedup", "psnr_db", "ssim",
        "max_abs_diff", "flops_skipped", "cache_bytes", "steps",
    } <= set(data)  # fmt: skip
    assert data["speedup"] == 2.0 and not data["identical"]
    assert len(data["steps"]) == 16 and {s["branch"] for s in data["steps"]} == {"cond", "uncond"}
    assert data["seconds_by_kind"]["dense"] == {"count": 8, "total": 4.0, "median": 0.5}
    executed = sum(data["flops_executed"].values()) / sum(data["flops_dense"].values())
    assert data["flops_skipped"] == pytest.approx(1 - executed)
    same = report.to_json(
        report.Comparison(**{**vars(comparison), "accelerated": comparison.dense.clone()})
    )
    assert same["psnr_db"] is None and same["identical"]
    json.dumps([data, same], allow_nan=False)


def test_report_is_complete_and_self_contained(comparison, tmp_path):
    """All files; the page holds its pictures, loads nothing, and what was typed is no markup."""
    path = report.write_report(comparison, tmp_path / "deep" / "out")
    names = {file.name for file in path.parent.iterdir()}
    assert {"report.html", "report.json", "density.png", "steps.png"} <= names
    assert {"dense.png", "accelerated.png", "difference.png"} <= names
    assert ("dense.webp" in names) == (len(comparison.dense) > 1)
    assert not any(name.startswith(".") for name in names)
    page = Page.of(path.read_text())
    page.check_self_contained()
    assert page.text("p.fo-prompt") == [comparison.prompt]
    flip = metrics.why_no_flip() is None and len(comparison.dense) == 1
    assert page.tags["img"] == (4 if flip else 3)
    assert page.text("h2") == [
        "Step by step", "Operation by operation", "Where the time went", "To do it again",
    ]  # fmt: skip


def test_figures_that_are_no_numbers_are_null(comparison, tmp_path):
    """A model that overflowed has a report too: it is then that somebody reads it."""
    first = {**comparison.summary.steps[0], "seconds": math.nan, "forecast_error": math.inf}
    odd = replace(
        comparison,
        accelerated=comparison.accelerated * math.nan,
        summary=replace(comparison.summary, steps=[first, *comparison.summary.steps[1:]]),
        errors_by_step=[None, math.nan],
    )
    page = report.write_report(odd, tmp_path).read_text()
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["steps"][0]["seconds"] is None and data["errors_by_step"] == [None, None]
    assert data["psnr_db"] is None and "not finite" in data["notes"][0]
    shown = re.sub(r"base64,[\w+/=]+", "", Page.of(page).source)
    assert "nan" not in shown.lower()


def test_the_page_opens_with_what_was_asked(comparison, tmp_path):
    """Warnings, the two results and a slider, the speed-up and every figure: in this order."""
    odd = replace(comparison, summary=replace(comparison.summary, notes=["<i>odd</i>"] * 6))
    page = Page.of(report.write_report(odd, tmp_path).read_text())
    assert page.text("li")[:6] == ["<i>odd</i>"] * 6 and "2 more" in page.text("summary")
    order = ["fo-notes", "fo-viewer", "fo-slider", "fo-speed", "fo-race", "fo-timeline", "fo-ops"]
    found = [name for name in page.classes if name in order]
    assert list(dict.fromkeys(found)) == order
    figures = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    data = json.loads((tmp_path / "report.json").read_text())
    names = dict(report.headline(data))
    told = {name: figures[key] for name in names for key in figures if key.startswith(name)}
    assert told == {k: v for k, v in names.items() if k not in ("dense", "accelerated", "speed-up")}
    assert page.text(".fo-speed")[0].startswith("2.00x")


def test_sliders_have_names_and_ends(comparison, tmp_path):
    """Native ranges, which a keyboard moves; frames only where there are several."""
    page = Page.of(report.write_report(comparison, tmp_path).read_text())
    ranges = [found for found in page.elements["input"] if found["type"] == "range"]
    frames = len(comparison.dense)
    assert [r["max"] for r in ranges] == ["100"] + [str(frames - 1)] * (frames > 1)
    assert all(found["aria-label"] for found in ranges)
    assert all("aria-pressed" in b for b in page.elements["button"] if "data-mode" in b)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [((1, 24, 32), 1), ((5, 16, 24), 5), ((64, 16, 16), 64), ((70, 16, 16), 64), ((3, 16, 256), 3)],
)
def test_sheets_hold_their_frames(shape, kept):
    """Each frame is where the page looks for it, the first and the last among them."""
    frames, height, width = shape
    grey = torch.linspace(0, 1, frames).view(-1, 1, 1, 1).expand(-1, 3, height, width)
    sheet = sheets.sheets({"a": grey})["a"]
    assert sheet.frames == kept and (sheet.width, sheet.height) == (width, height)
    assert sheet.columns * sheet.rows >= kept > sheet.columns * (sheet.rows - 1)
    content = base64.b64decode(sheet.uri.partition(",")[2])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (sheet.columns * width, sheet.rows * height)
        for i in (0, kept // 2, kept - 1):
            at = i % sheet.columns * width + width // 2, i // sheet.columns * height + height // 2
            shown = sheets.picked(frames, sheets.FRAMES)[i]
            assert picture.convert("RGB").getpixel(at)[0] == round(255 * float(grey[shown].mean()))


def test_sheets_are_bounded(monkeypatch):
    """What is too large is compressed, then scaled: noise too stays within the bytes."""
    monkeypatch.setattr(sheets, "BYTES", 20_000)
    monkeypatch.setattr(sheets, "PIXELS", 200 * 200)
    sheet = sheets.sheets({"a": torch.rand(7, 3, 160, 240)})["a"]
    assert sheet.columns * sheet.width * sheet.rows * sheet.height <= 200 * 200
    assert len(base64.b64decode(sheet.uri.partition(",")[2])) <= 20_000


@pytest.mark.slow
def test_a_report_says_how_to_make_it_again(comparison, tmp_path):
    """The command, escaped, where one made it; the words that were typed stay apart."""
    report.write_report(comparison, tmp_path / "by hand")
    plain = (tmp_path / "by hand" / "report.html").read_text()
    told = replace(comparison, command="flashomni generate --prompt 'a <b>'")
    report.write_report(told, tmp_path / "told")
    page = (tmp_path / "told" / "report.html").read_text()
    assert "<pre>flashomni generate --prompt &#x27;a &lt;b&gt;&#x27;</pre>" in page
    assert page.count("<pre>") == plain.count("<pre>") + 1
    assert json.loads((tmp_path / "told" / "report.json").read_text())["command"] == told.command


def test_the_command_line_can_be_typed_again(monkeypatch):
    """A prompt of several words is quoted."""
    monkeypatch.setattr(sys, "argv", ["x", "generate", "--prompt", "a ring", "--steps", "4"])
    assert command_line() == "flashomni generate --prompt 'a ring' --steps 4"


def test_a_failing_disk_leaves_nothing_half_written(comparison, tmp_path, monkeypatch):
    """The error comes through, and no temporary file stays."""

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(comparison, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_table_fits_a_terminal(comparison):
    """80 columns, the headline figures in it."""
    console = Console(width=80, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    report.print_table(comparison, console)
    text = console.export_text()
    assert "2.00x" in text and "dB" in text and "dispatch" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def table(comparison):
    console = Console(width=80, record=True, file=io.StringIO())
    report.print_table(comparison, console)
    return console.export_text()


def test_table_prints_brackets_as_they_are(comparison):
    """Neither a model's path nor a note is markup; many notes do not flood the terminal."""
    notes = [f"layer {i}: weight [/red] is odd" for i in range(40)]
    text = table(
        replace(comparison, model="runs/[/x]/v2", summary=replace(comparison.summary, notes=notes))
    )
    assert "runs/[/x]/v2" in text and "layer 0: weight [/red] is odd" in text
    assert "35 more notes" in text and len(text.splitlines()) < 40


def test_phases_compare_means(comparison):
    """Two sorts of Dispatch: the ratio follows the totals; without a dense run there is none."""
    seconds = {"dispatch": {"count": 3, "total": 0.6, "median": 0.05}}
    summary = replace(comparison.summary, seconds_by_kind=seconds)
    rows = report.phases(report.to_json(replace(comparison, summary=summary)))
    assert rows[1] == ("dispatch", "3", "0.60", "50.0", "200.0", "2.50x")
    alone = replace(comparison, summary=summary, dense_call_seconds=[])
    assert [row[-1] for row in report.phases(report.to_json(alone))] == ["", ""]


def test_host_cache_is_shown(comparison):
    """A cache moved to host memory does not look like none."""
    summary = replace(comparison.summary, cache_bytes=0, cache_bytes_host=3 * 2**20)
    assert "3.0 MiB in pinned host memory" in str(summary)
    rows = dict(report.headline(report.to_json(replace(comparison, summary=summary))))
    assert rows["cache in host memory"] == "3.0 MiB"


@pytest.mark.parametrize(("frames", "shown"), [(2, 2), (8, 8), (9, 8)])
def test_strip_repeats_no_frame(tmp_path, frames, shown):
    """A video shorter than the strip shows each frame once."""
    report.save_picture(torch.rand(frames, 3, 16, 20), tmp_path / "video")
    with Image.open(tmp_path / "video.png") as strip:
        assert strip.size == (20 * shown, 16)


def test_density_maps_mark_full_and_update(summary):
    """The last step is Full, the first an Update; a map pair for each branch."""
    axes = [axis for axis in viz.density_maps(summary).axes if axis.get_title()]
    assert len(axes) == 4
    for axis in axes:
        marks = "".join(label.get_text() for label in axis.get_xticklabels())
        assert "U" in marks and "F" in marks


def test_difference_names_its_amplification():
    """A gap of 1/64 is amplified to just below 1, by a power of two."""
    picture = torch.full((1, 3, 16, 16), 0.5)
    gap, factor = viz.difference(picture, picture + 1 / 64)
    assert factor == 64 and gap.max() == pytest.approx(1.0)
    gap, factor = viz.difference(picture, picture)
    assert factor == 1 and gap.max() == 0


def test_symbols_can_be_drawn():
    """A panel a head; a head that does not exist is refused."""
    symbols = Symbols.cached(Grid(600, 600, (0, 50)), 1, 6)
    assert len(viz.draw_symbols(symbols).axes) == 4
    with pytest.raises(ValueError, match="heads must be from 0 to 5, got 6"):
        viz.draw_symbols(symbols, heads=[6])
