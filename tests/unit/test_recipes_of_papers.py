"""Recipes of published methods: each names its paper, runs, and has its row in docs/methods.md."""

import importlib.util
from pathlib import Path

import pytest
import torch

import flashomni
from conftest import call
from flashomni.engine import Recipe, presets
from flashomni.engine.forecasts import forecasts
from flashomni.engine.recipe import methods
from flashomni.engine.schedules import schedules
from flashomni.lab import zoo
from flashomni.lab.generation import Generation
from flashomni.models import adapters

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
# A tiny model has four blocks.
SETTINGS = {"dbcache": {"front": 2}}


@pytest.fixture(scope="module")
def tool():
    """tools/methods.py, which fills the page."""
    spec = importlib.util.spec_from_file_location("tool_methods", ROOT / "tools" / "methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_and_presets_are_told_apart_by_their_source():
    assert not set(methods()) & set(presets()) and len(methods()) >= 12
    assert all(Recipe.of(name).source for name in methods())
    assert not any(Recipe.of(name).source for name in presets())


@pytest.mark.parametrize("name", methods())
def test_a_method_runs(name):
    """Twelve steps of a tiny model with two branches: finite, and something is left out."""
    torch.manual_seed(0)
    model, inputs = adapters()["QwenImageTransformer2DModel"].tiny()
    with (
        torch.no_grad(),
        flashomni.accelerate(model.eval(), name, **SETTINGS.get(name, {})) as engine,
    ):
        for step in range(12):
            for branch in ("cond", "uncond"):
                engine.step(step, 12, branch)
                assert call(model, inputs).isfinite().all()
        report = engine.report()
    assert report.recipe["source"] == Recipe.of(name).source
    assert report.flops_skipped > 0.05


def test_the_page_names_every_file():
    """Each recipe, each schedule and each forecast has its place in the table."""
    page = PAGE.read_text("utf-8")
    for name in (*methods(), *schedules(), *forecasts()):
        assert name in page, name


def test_every_recipe_of_the_page_is_one(tool):
    found = list(tool.recipes_of(PAGE.read_text("utf-8")))
    assert len(found) == len(set(found)) >= 16
    for name in found:
        Recipe.of(name.removesuffix(tool.CALIBRATED))


def test_the_tool_fills_cells_and_nothing_else(tool):
    page = "text\n\n| a | recipe | measured |\n|---|---|---|\n| 1 | `fora` |  |\n| 2 | - | x |\n"
    assert list(tool.recipes_of(page)) == ["fora"]
    assert tool.filled(page, {"fora": "3 dB", "other": "4 dB"}) == page.replace("|  |", "| 3 dB |")
    cell = tool.in_words([(40.0, 7, 0.75), (30.0, 8, 0.65)])
    assert cell == "35.0 / 30.0 dB, 7.5 computed, 70% skipped"


def test_the_calibration_is_of_the_run(tool):
    """A ratio a step, the first 1; a polynomial of degree 4; both are settings."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    loaded.pipe.set_progress_bar_config(disable=True)
    job = Generation(loaded, "a ring", 0, 7)
    job.call = {**job.call, "height": 64, "width": 64}
    found = tool.calibrate(job)
    assert len(found["magcache"]["ratios"]) == 7 and found["magcache"]["ratios"][0] == 1.0
    assert len(found["teacache"]["coefficients"]) == 5
    for name, settings in found.items():
        assert Recipe.of(name, **settings).schedule.name == name
