"""What a summary is saved as: text, JSON, a page; the timeline's lanes; a browser's look at it."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from pages import Page

import flashomni
from flashomni.engine.experts import merged
from flashomni.engine.schedules.adaptive import Adaptive
from flashomni.lab import report
from flashomni.lab.generation import errors_by_step
from flashomni.models import adapters
from flashomni.page import data_block, in_seconds, table
from flashomni.page.timeline import timeline
from flashomni.util.words import in_bytes


def generate(recipe, **settings):
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    with torch.no_grad(), flashomni.accelerate(model, recipe, **settings) as engine:
        for step in range(8):
            engine.step(step, 8)
            model(**inputs)
        return engine.report()


@pytest.fixture(scope="module")
def summary():
    return generate("topk")


def shown(page):
    """What the page's script is given."""
    blocks = re.findall(r'class="fo-data">(.*?)</script>', page.source, re.S)
    return [json.loads(block) for block in blocks]


def test_steps_know_memory_and_shares(summary):
    """Bytes behind each call, whose largest is the peak; shares of FLOPs add up to the total."""
    assert max(step["cache_bytes"] for step in summary.steps) == summary.cache_bytes > 0
    assert {step["allocated_bytes"] for step in summary.steps} == {None}  # no GPU
    for step in summary.steps:
        assert len(step["executed"]) == len(summary.layers)
        assert all(0 <= share <= 1.2 for share in step["executed"])
    dense = [s for s in summary.steps if s["kind"] == "full"]
    assert dense and all(share == 1 for step in dense for share in step["executed"])
    assert any(share < 1 for step in summary.steps for share in step["executed"])
    kinds = {(s["kind"], word) for s in summary.steps for word in s["does"]}
    assert ("update", "chooses") in kinds


def test_forecast_errors_are_those_of_schedules_that_measure(summary):
    """A number at Updates behind the first, nothing elsewhere; nothing at all by default."""
    assert {step["forecast_error"] for step in summary.steps} == {None}
    found = generate("fora", schedule=Adaptive()).steps
    errors = {s["step"]: s["forecast_error"] for s in found if s["forecast_error"] is not None}
    assert errors and all(0 <= error < 10 for error in errors.values())
    assert all(found[step]["kind"] == "update" for step in errors)


def test_refreshes_are_told():
    """Of a recipe that carries what sparse attention misses."""
    settings = {"in_computed": True, "carry": "hold", "choose_at": (1,), "refresh": 2}
    steps = generate("topk", **settings).steps
    assert any("refreshes" in step["does"] for step in steps)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".html", ".HTML"])
def test_a_summary_is_saved_by_its_suffix(summary, tmp_path, suffix):
    """Whole, with a folder made where need be, and nothing beside it."""
    path = summary.save(tmp_path / "new" / f"r{suffix}")
    assert [file.name for file in path.parent.iterdir()] == [f"r{suffix}"]
    text = path.read_text()
    if suffix == ".txt":
        assert text == f"{summary}\n"
    elif suffix == ".json":
        assert json.loads(text) == json.loads(json.dumps(summary.to_dict()))
    else:
        page = Page.of(text)
        page.check_self_contained()
        assert page.text(".fo-speed")[0].startswith(f"{summary.flops_skipped:.1%}")
        assert len(shown(page)[0]["steps"]) == 8


@pytest.mark.parametrize("name", ["report", "report.pdf", ".html"])
def test_other_suffixes_are_refused(summary, tmp_path, name):
    """The error names what is allowed; nothing is written."""
    with pytest.raises(ValueError, match=r"path must end with \.txt, \.json, \.html, got '"):
        summary.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_keeps_the_older_report(summary, tmp_path, monkeypatch):
    """And leaves no temporary file."""
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        summary.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_call_under_way_is_no_number(summary, tmp_path):
    """Its seconds are not known: null in JSON, and the page is still made."""
    first = {**summary.steps[0], "seconds": math.nan}
    timed = {"full": {"count": 1, "total": math.nan, "median": math.nan}}
    odd = replace(summary, steps=[first, *summary.steps[1:]], seconds_by_kind=timed)
    assert json.loads(odd.save(tmp_path / "r.json").read_text())["steps"][0]["seconds"] is None
    assert "nan" not in Page.of(odd.save(tmp_path / "r.html").read_text()).source.lower()


def test_nothing_that_ran_is_still_a_report(tmp_path):
    """Before the first call: no lanes, no bars, no error."""
    model, _ = adapters()["FluxTransformer2DModel"].tiny()
    with flashomni.accelerate(model, "balanced") as engine:
        page = Page.of(engine.report().save(tmp_path / "r.html").read_text())
    assert "fo-timeline" not in page.classes and "fo-ops" not in page.classes


def test_a_notebook_shows_it_without_scripts(summary):
    """A fragment under one class, nothing that runs, text escaped."""
    odd = replace(summary, notes=["</style><script>alert(1)</script>"])
    page = Page.of(odd._repr_html_())
    running = [a for a in page.elements["script"] if a.get("type") != "application/json"]
    assert not running and not {"html", "body", "head"} & set(page.tags)
    assert page.text("li")[0] == odd.notes[0]
    style = page.text("style")[0]
    selectors = re.findall(r"^([.@\[\w][^{]*)\{", style, re.M)
    assert all(".fo" in s or s.startswith(("@", "rect.fo", "body:has")) for s in selectors)


def test_lanes_are_what_is_known(summary):
    """Densities only where they are neither all nor nothing, errors only where there are some."""
    data = summary.to_dict()

    def lanes(**more):
        page = Page.of(timeline(data, **more))
        return [name for name in page.text("b") if name and not name.endswith("%")]

    assert lanes() == ["time", "layers", "tiles", "key blocks", "cache"] or lanes() == [
        "time", "layers", "key blocks", "cache",
    ]  # fmt: skip
    assert "error" in lanes(errors=[0.01 * i for i in range(8)])
    assert "dashed: dense, 2.00 s" in timeline(data, dense_seconds=2.0)
    kinds = {kind for step in data["steps"] for kind in step["layer_kinds"]}
    keys = Page.of(timeline(data)).elements["i"]
    assert {f"fo-{kind}" for kind in kinds} <= {name for a in keys for name in a["class"].split()}


def test_every_cell_of_the_map_is_drawn_once(summary):
    """The rectangles of all paths cover layers x steps, without overlap."""
    text = timeline(summary.to_dict())
    svg = text[text.index("fo-map") :].partition("</svg>")[0]
    cells = []
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1", svg):
        cells += [(int(x) + i, int(y)) for i in range(int(width))]
    expected = [(x, y) for x in range(8) for y in range(len(summary.layers))]
    assert sorted(cells) == sorted(expected)


def test_experts_have_lanes_of_their_own(summary):
    """Two transformers of one pipeline; a step says in which it ran."""
    second = replace(summary, layers=summary.layers[:2], steps=[
        {**s, "layer_kinds": s["layer_kinds"][:2]} for s in summary.steps
    ])  # fmt: skip
    both = merged({"a": summary, "b": second}, {"a": True, "b": True})
    page = Page.of(timeline(both.to_dict()))
    assert [name.partition(",")[0] for name in page.text("h3")] == ["a", "b"]
    assert len(shown(page)) == 2


def test_errors_by_step_are_relative():
    """Half of what there is; not known where it is not a number, or shapes differ."""
    ones = [torch.ones(2, 3), torch.ones(2, 3)]
    assert errors_by_step(ones, [1.5 * ones[0], ones[1]]) == pytest.approx([0.5, 0.0])
    assert errors_by_step(ones, [ones[0] * math.nan, ones[1]]) == [None, 0.0]
    assert errors_by_step(ones, ones[:1]) == []


def test_words_and_tables():
    """Units that people read; nothing in a table or a block of data is markup."""
    assert [in_bytes(x) for x in (12, 3 << 20, 5 << 30)] == ["12 B", "3.0 MiB", "5.00 GiB"]
    assert [in_seconds(x) for x in (0.0042, 0.25, 3, 250)] == [
        "4.2 ms",
        "250 ms",
        "3.00 s",
        "250 s",
    ]
    assert Page.of(table(("<b>",), [("<i>", "x")])).text("th") == ["<b>", "<i>"]
    assert "</script" not in data_block({"a": "</script>"}, "x").removesuffix("</script>")


PROBE = """<script>addEventListener("load", () => {
  const find = (name) => document.querySelector(name), seen = [];
  seen.push(document.documentElement.scrollWidth <= innerWidth);
  const slider = find(".fo-slider");
  slider.value = 80;
  slider.dispatchEvent(new Event("input"));
  seen.push(getComputedStyle(find(".fo-viewer")).getPropertyValue("--at"));
  seen.push(getComputedStyle(find(".fo-fast .fo-frame")).clipPath);
  const scrub = find(".fo-scrub");
  scrub.value = 4;
  scrub.dispatchEvent(new Event("input"));
  seen.push(find("output").textContent);
  const images = [...document.querySelectorAll(".fo-pair img")];
  const places = images.map((image) => getComputedStyle(image).transform);
  seen.push(places[0] === places[1] && places[0] !== "none");
  find("[data-mode='2']").click();
  seen.push(getComputedStyle(find(".fo-pair")).display, find("[data-view='2']").hidden);
  const key = new KeyboardEvent("keydown", {key: "ArrowRight"});
  find(".fo-timeline").dispatchEvent(key);
  find(".fo-timeline").dispatchEvent(key);
  seen.push(find(".fo-readout").textContent.split(" \u00b7 ")[0]);
  document.title = JSON.stringify(seen);
})</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1440])
def test_a_browser_shows_it(summary, tmp_path, width):
    """It fits the width; slider, frames, buttons and arrow keys do what they say."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    video = torch.rand(9, 3, 32, 48)
    comparison = report.Comparison(
        model="tiny", prompt="a ring", seed=0, call={}, dense=video, accelerated=video.flip(0),
        seconds_dense=4.0, seconds_accelerated=2.0, dense_call_seconds=[0.5] * 8, summary=summary,
        versions={}, errors_by_step=[0.01 * i for i in range(8)],
    )  # fmt: skip
    path = report.write_report(comparison, tmp_path / "out")
    path.write_text(path.read_text().replace("</head>", f"{PROBE}</head>"))
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", path.as_uri()],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    fits, at, clip, frame, together, pair, hidden, step = json.loads(title)
    assert fits and at == "80%" and "80%" in clip
    assert frame == "5 / 9" and together
    assert pair == "none" and hidden is False and step == "step 1"
