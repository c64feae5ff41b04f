"""Pages that are files, in a real browser at three widths: `make studio-test`."""

import dataclasses

import pytest
import torch

import flashomni
from flashomni.lab import report
from flashomni.lab.fidelity.compare_page import Shown, write_page
from flashomni.lab.fidelity.comparison import Comparison, Picture, Timed
from flashomni.models import adapters

pytest_plugins = ["chromium"]
WIDTHS = (390, 820, 1440)
LONG = "a_very_long_name_without_any_place_to_break_it_" * 4
METHODS = ["balanced:interval=3,order=1", f"diffusers.mag:steps={list(range(0, 50, 2))}", LONG]


@pytest.fixture(scope="module")
def summary():
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    with torch.no_grad(), flashomni.accelerate(model, "topk") as engine:
        for step in range(50):
            for branch in ("cond", "uncond"):
                engine.step(step, 50, branch)
                model(**inputs)
        found = engine.report()
    layers = [f"{LONG}.{name}" for name in found.layers]
    return dataclasses.replace(found, layers=layers, notes=[LONG] * 6)


def of_one(summary, folder, frames=1):
    dense = torch.rand(frames, 3, 96, 64)
    made = report.Comparison(
        LONG, f"{LONG} {LONG}", 3, {"height": 32, LONG: LONG}, dense,
        (dense + 0.1 * torch.rand_like(dense)).clamp(0, 1), 4.0, 2.0, [0.5] * 100, summary,
        {LONG: LONG}, command=f"flashomni generate {LONG}", errors_by_step=[0.1] * 50,
    )  # fmt: skip
    return report.write_report(made, folder)


def of_methods(summary, folder):
    shown, pictures = Shown(len(METHODS)), []
    for method in METHODS:
        for prompt in range(2):
            dense, made = torch.rand(2, 1, 3, 64, 96)
            shown(method, prompt, 0, dense, made)
            pictures.append(Picture(method, prompt, 0, 40.0, 0.9, None, 5, 0.5, 0.4, {LONG: 0.5}))
    times = [Timed(method, "recipes", 1.0, 2.0) for method in METHODS]
    found = Comparison.of(pictures, times, torch.device("cpu"), left_out=[LONG])
    return write_page(
        found, shown, folder, model=LONG, prompts=[LONG, "a cat"], rivals=METHODS[1:],
        methods=METHODS[:1], command=f"flashomni compare {LONG}", versions={LONG: LONG},
    )  # fmt: skip


PAGES = {
    "report of a picture": of_one,
    "report of a video": lambda summary, folder: of_one(summary, folder, 9),
    "report of a generation": lambda summary, folder: summary.save(folder / "report.html"),
    "comparison": of_methods,
}


@pytest.fixture(scope="module", params=PAGES)
def address(request, summary, tmp_path_factory):
    return PAGES[request.param](summary, tmp_path_factory.mktemp("page")).as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(browser, address, width):
    """Of the longest names too; what has to be wide scrolls in a frame of its own."""
    wrong = []
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url))
    page.goto(address)
    for button in page.locator(".fo-modes button").all():
        button.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in page.locator("details").all():
        part.evaluate("each => { each.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.scrollWidth") <= width
    page.close()
    assert [each for each in wrong if each != address and not each.startswith("data:")] == []


def test_a_method_is_picked(browser, summary, tmp_path):
    """One at a time; the slider stays between it and the stock pipeline."""
    page = browser.new_page()
    page.goto(of_methods(summary, tmp_path).as_uri())
    first = page.locator(".fo-viewer").first
    assert [each.is_visible() for each in first.locator(".fo-fast").all()] == [True, False, False]
    first.locator("select").select_option(index=2)
    assert [each.is_visible() for each in first.locator(".fo-fast").all()] == [False, False, True]
    assert first.locator(".fo-dense img").evaluate("i => i.complete && i.naturalWidth") == 96
    page.close()
