"""The studio's page in a real browser: `make studio-test`. Needs gradio, playwright, a Chromium."""

import importlib.util
import json
import re
import threading
import uuid
from urllib.request import Request, urlopen

import pytest
import torch
from typer.testing import CliRunner

from flashomni.cli import app as cli
from flashomni.engine import Recipe
from flashomni.studio.shelf import Shelf

try:
    from playwright.sync_api import expect
except ModuleNotFoundError:
    expect = None  # then nothing of it runs

pytest_plugins = ["chromium"]
MODEL = "tiny-image"
SIZE, STEPS = 64, 4
PATIENCE = 60_000  # ms until a page is taken to be stuck
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="not here: gradio (extra 'studio')"
)


@pytest.fixture(scope="module")
def shelf():
    return Shelf("cpu", torch.float32)


@pytest.fixture(scope="module")
def url(shelf):
    """A studio of its own, on a free port."""
    from flashomni.studio.app import serve

    blocks, url = serve(shelf, MODEL)
    yield url
    blocks.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page as somebody new; whatever goes wrong in it fails the test."""
    contexts, wrong = [], []

    def open_page(width=1200):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(foreign(request.url, url)))
        page.goto(url)
        expect(page.locator("#knob-schedule-computed")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in wrong if each] == []


def foreign(asked, url):
    """An address that is not the studio's: the page fetches nothing from elsewhere."""
    return "" if asked.startswith((url, "data:", "blob:")) else asked


def number(page, name, value):
    """Type a number, as a user would."""
    box = page.locator(f"{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def make_small(page, steps=STEPS):
    page.get_by_text("Size and preview").click()
    number(page, "#width", SIZE)
    number(page, "#height", SIZE)
    number(page, "#steps", steps)
    expect(page.locator("#recipe-line")).to_contain_text(f"of {steps} steps")


def compare(page):
    page.locator("#compare").click()
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.get_by_test_id("figures")).to_be_visible()


def runs(page):
    """The table of what this page has tried, newest first."""
    page.get_by_role("tab", name="Runs").click()
    rows = page.get_by_test_id("history").locator("tbody tr").all()
    page.get_by_role("tab", name="Compare").click()
    return [row.locator("td").all_text_contents() for row in rows]


def downloaded(page, tmp_path):
    with page.expect_download() as waiting:
        page.locator("#download").click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_whole_comparison(visit):
    """Steps as they come, two pictures under a slider, figures, maps, times."""
    page = visit()
    make_small(page, steps=12)
    number(page, "#knob-schedule-computed", 4)
    expect(page.locator("#recipe-line")).to_contain_text("computes 4 of 12 steps")
    page.locator("#compare").click()
    expect(page.locator(".fo-preview")).to_be_visible()
    expect(page.locator("#stage")).to_contain_text(re.compile(r"(dense|accelerated) · \d+ of 12"))
    expect(page.get_by_test_id("figures")).to_contain_text("PSNR to dense")
    expect(page.locator("#stage")).to_be_hidden()
    for image in page.locator("#slider img").all()[:2]:
        assert image.evaluate("i => i.complete && i.naturalWidth") == SIZE
    page.get_by_role("tab", name="Difference").click()
    for name in ("#difference", "#flip"):
        expect(page.locator(f"{name} img")).to_be_visible()
    page.get_by_role("tab", name="Computed").click()
    maps = page.get_by_test_id("density").locator("svg.fo-cells")
    expect(maps).to_have_count(2)
    assert "12 steps" in maps.first.get_attribute("aria-label")
    page.get_by_role("tab", name="Time").click()
    assert page.get_by_test_id("times").locator(".fo-calls rect").count() == 12
    ((recipe, computed, *_),) = runs(page)
    assert (recipe, computed) == ("balanced-edited", "4 of 12")


def test_sliders_change_the_recipe_that_is_downloaded(visit, tmp_path):
    """Numbers, choices, switches, another policy with settings of its own, a refused value."""
    page = visit()
    number(page, "#knob-schedule-computed", 7)
    expect(page.locator("#recipe-line")).to_contain_text("computes 7 of 28 steps")
    page.get_by_text("Attention: what is skipped").click()
    choose(page, "#knob-policy", "topk")
    number(page, "#knob-policy-kv_density-topk", 0.25)
    page.locator("#knob-sparse-in_computed input").check()
    choose(page, "#knob-sparse-carry", "hold")
    choose(page, "#knob-sparse-summaries", "4")
    expect(page.locator("#recipe-line")).to_contain_text("summaries 4, carry hold")
    path = downloaded(page, tmp_path)
    recipe = Recipe.load(path)
    assert path.name == "balanced-edited.json" and recipe.schedule.computed == 7
    assert recipe.policy.name == "topk" and recipe.policy.kv_density == 0.25
    assert recipe.sparse.in_computed and recipe.sparse.carry == "hold"
    assert recipe.sparse.summaries == 4
    page.get_by_text("Everything else").click()
    box = page.locator("#knob-sparse-choose_at input, #knob-sparse-choose_at textarea")
    box.fill("never")
    box.press("Enter")
    expect(page.locator("#recipe-line [role=alert]")).to_contain_text("choose_at")
    expect(box).to_have_value("update")
    assert Recipe.load(downloaded(page, tmp_path)) == recipe


def test_a_slider_that_is_dragged_stays_in_hand(visit):
    """What its first moves change in the page does not take it away: another schedule, names."""
    page = visit()
    slider = page.locator("#knob-schedule-computed input[type=range]")
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * (10 - 2) / (28 - 2), middle)
    page.mouse.down()
    for part in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        page.mouse.move(box["x"] + box["width"] * part, middle, steps=4)
    expect(page.locator("#knob-schedule")).to_be_visible()
    page.mouse.up()
    expect(page.locator("#recipe-line")).to_contain_text("computes 28 of 28 steps")
    assert slider.input_value() == "28"
    expect(page.locator("#knob-schedule input")).to_have_value("ramp")


def choose(page, name, value):
    page.locator(f"{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def test_a_recipe_can_be_opened(visit, tmp_path):
    """A file of one's own; one that is none says so and changes nothing."""
    page = visit()
    good, bad = tmp_path / "mine.json", tmp_path / "bad.json"
    Recipe.of("fast", name="mine", computed=6).save(good)
    bad.write_text(json.dumps({"policy": {"name": "moon"}}))
    page.locator("input[type=file]").set_input_files(good)
    expect(page.locator("#recipe-line")).to_contain_text("mine: computes 6 of 28 steps")
    page.locator("input[type=file]").set_input_files(bad)
    expect(page.locator("#recipe-line [role=alert]")).to_contain_text("moon")
    assert Recipe.load(downloaded(page, tmp_path)).name == "mine"


def test_a_bad_model_path_keeps_what_was_loaded(visit):
    """It says what is wrong, as text, and the page still generates."""
    page = visit()
    make_small(page)
    box = page.locator("#model input")
    box.fill("/nowhere/<img src=x onerror=alert(1)>")
    page.locator("#load").click()
    message = page.locator("#model-line [role=alert]")
    expect(message).to_contain_text("/nowhere/<img src=x")
    expect(message).to_contain_text(f"The page keeps {MODEL}")
    assert page.locator("#model-line img").count() == 0
    compare(page)
    assert len(runs(page)) == 1


def test_a_video(visit):
    """Another model, chosen in the page: two videos in step, and any frame of them."""
    page = visit()
    choose(page, "#model", "tiny-video")
    expect(page.locator("#model-line")).to_contain_text("HunyuanVideo")
    make_small(page)
    number(page, "#num_frames", 9)
    compare(page)
    expect(page.locator("#playback img")).to_be_visible()
    assert page.locator("#playback img").evaluate("i => i.naturalWidth") > 2 * SIZE
    before = page.locator("#slider img").first.get_attribute("src")
    number(page, "#frame", 0)
    expect(page.locator("#slider img").first).not_to_have_attribute("src", before)


def test_the_command_refuses_a_bad_model():
    """Before any page is there, in one sentence."""
    done = CliRunner().invoke(cli, ["studio", "--model", "/nowhere"])
    assert done.exit_code == 2 and "error: model must be tiny-image" in done.output


def test_what_strangers_reach_loads_only_what_it_was_started_with(browser):
    """Not asked for, it is refused before any page is there; else the page offers nothing more."""
    from flashomni.studio.app import serve

    with pytest.raises(ValueError, match="share needs a shelf with only"):
        serve(Shelf("cpu", torch.float32), MODEL, share=True)
    blocks, url = serve(Shelf("cpu", torch.float32, only=[MODEL]), MODEL)
    page = browser.new_page()
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("those that this page was started with")
    page.locator("#model input").click()
    expect(page.get_by_role("option")).to_have_count(1)
    page.close()
    blocks.close()


class Client:
    """An open page without a browser: it opens, and asks for a comparison."""

    def __init__(self, url):
        self.url, self.name = url, uuid.uuid4().hex
        config = self._json("config")
        self.ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
        self.handlers = config["dependencies"]
        self._join(next(h for h in self.handlers if h["targets"][0][1] == "load"), [])
        self.messages = urlopen(f"{url}gradio_api/queue/data?session_hash={self.name}")
        self._until_done()

    def click(self, name, *data):
        target = [self.ids[name], "click"]
        self._join(next(h for h in self.handlers if target in h["targets"]), [None, *data])

    def _until_done(self):
        while b"process_completed" not in self.messages.readline():
            pass

    def _join(self, handler, data):
        body = {"data": data, "fn_index": handler["id"], "session_hash": self.name}
        self._json("gradio_api/queue/join", json.dumps(body).encode())

    def _json(self, path, body=None):
        kind = {"Content-Type": "application/json"}
        with urlopen(Request(self.url + path, body, kind), timeout=PATIENCE / 1000) as reply:
            return json.load(reply)


def test_pages_that_wait_leave_the_others_alone(visit, url, shelf):
    """More of them than the server has threads for clicks: the next page opens, and can cancel."""
    gone = threading.Event()
    with shelf.turns.mine(gone, lambda place: None):
        waiting = [Client(url) for _ in range(45)]
        for client in waiting:
            client.click("compare", "a red circle", 0, STEPS, True, SIZE, SIZE, None)
        page = visit()
        make_small(page)
        page.locator("#compare").click()
        expect(page.locator("#stage")).to_contain_text("46 runs come first")
        page.locator("#cancel").click()
        expect(page.locator("#stage")).to_have_text("cancelled")
        for client in waiting:
            client.click("cancel")
            client.messages.close()
        while len(shelf.turns) > 1:
            page.wait_for_timeout(100)


def test_two_browsers_at_once(visit):
    """They take turns at the pipeline; recipes, pictures and results stay apart."""
    pages = [visit(), visit()]
    for page, computed, seed in zip(pages, (2, 3), (1, 2), strict=True):
        make_small(page)
        number(page, "#seed", seed)
        number(page, "#knob-schedule-computed", computed)
        expect(page.locator("#recipe-line")).to_contain_text(f"computes {computed} of {STEPS}")
    for page in pages:
        page.locator("#compare").click()
    for page in pages:
        expect(page.get_by_test_id("figures")).to_be_visible()
    assert [[row[1] for row in runs(page)] for page in pages] == [["2 of 4"], ["3 of 4"]]
    pictures = [page.locator("#slider img").first.get_attribute("src") for page in pages]
    assert pictures[0] != pictures[1]


def test_cancel_ends_a_run_and_the_next_one_starts(visit):
    """A run of many steps ends at its next one."""
    page = visit()
    make_small(page, steps=100)
    page.locator("#compare").click()
    expect(page.locator(".fo-preview")).to_be_visible()
    page.locator("#cancel").click()
    expect(page.locator("#stage")).to_have_text("cancelled")
    number(page, "#steps", STEPS)
    expect(page.locator("#recipe-line")).to_contain_text(f"of {STEPS} steps")
    compare(page)


def test_a_browser_that_is_closed_ends_its_run(visit, browser, url):
    """The next one does not wait for what nobody will see."""
    gone = visit()
    make_small(gone, steps=100)
    number(gone, "#width", 256)
    number(gone, "#height", 256)
    gone.locator("#compare").click()
    expect(gone.locator("#stage")).to_contain_text(" of 100")
    gone.context.close()
    page = visit()
    make_small(page)
    compare(page)


def test_tuning_gives_a_verdict(visit):
    """With progress; the recipe that it finds is the page's, or the reason why there is none."""
    page = visit()
    make_small(page, steps=6)
    number(page, "#knob-schedule-computed", 3)
    expect(page.locator("#recipe-line")).to_contain_text("computes 3 of 6 steps")
    page.get_by_text("Tune for this prompt").first.click()
    number(page, "#tries", 0)
    page.locator("#tune").click()
    expect(page.locator("#verdict")).to_contain_text("3 of 6 steps give")
    expect(page.locator("#recipe-line")).to_contain_text("computes 3 of 6 steps")


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_fits_every_width(visit, width):
    """Nothing makes it wider than the screen; the result is next to the buttons, or below them."""
    page = visit(width)
    make_small(page)
    compare(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ask, result, recipe = (
        page.locator(name).bounding_box() for name in ("#fo-ask", "#fo-result", "#fo-recipe")
    )
    if width < 760:
        assert ask["y"] < result["y"] < recipe["y"]
    else:
        assert result["x"] >= ask["x"] + ask["width"] and abs(result["y"] - ask["y"]) < 20
