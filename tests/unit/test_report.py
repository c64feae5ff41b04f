"""Metrics against known values; the report complete, self-contained, escaped, all or nothing."""

import io
import json
import math
import os
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from rich.console import Console

import flashomni
from flashomni.cli._common import command_line
from flashomni.lab import metrics, report, viz
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


class Page(HTMLParser):
    """Collects what a browser would load or run."""

    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]


def test_report_is_complete_and_self_contained(comparison, tmp_path):
    """All files; five pictures inside the page, nothing loaded, the prompt escaped."""
    path = report.write_report(comparison, tmp_path / "deep" / "out")
    names = {file.name for file in path.parent.iterdir()}
    assert {"report.html", "report.json", "density.png", "steps.png"} <= names
    assert {"dense.png", "accelerated.png", "difference.png"} <= names
    assert ("dense.webp" in names) == (len(comparison.dense) > 1)
    assert not any(name.startswith(".") for name in names)
    page = Page()
    page.feed(path.read_text())
    assert "script" not in page.tags and page.tags.count("img") == 5
    assert all(load.startswith("data:image/") for load in page.loads)


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
