"""Recipes of published methods: each names its paper, runs, and has its row in docs/methods.md."""

import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashomni
from conftest import call
from flashomni.engine import Recipe, presets
from flashomni.engine.forecasts import forecasts
from flashomni.engine.recipe import methods
from flashomni.engine.schedules import schedules
from flashomni.lab import results, zoo
from flashomni.lab.fidelity.calibrate import calibrate
from flashomni.lab.fidelity.comparison import Comparison, Picture, Summed
from flashomni.lab.fidelity.equal_time import at_equal_time
from flashomni.lab.generation import Generation
from flashomni.models import adapters
from flashomni.policies import policies
from flashomni.policies._trained import TRAINED

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from methods import by_importance, keep, sound, together
from rows import page as page_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods.md"
# A tiny model has four blocks, and few tokens: what is cut into 16 of them can be skipped.
FINE = {"block_m": 16, "block_n": 16, "token_order": "raster"}
SETTINGS = {
    "dbcache": {"front": 2},
    "sta": {**FINE, "tile": "1x2x2", "window": "1x1x1"},
    "radial": {**FINE, "frames": 8, "width": 0.0, "choose_at": [2], "dense_steps": 2},
    "svg": FINE,
    "draft": {**FINE, "pool": "2x2"},
    "jenga": {**FINE, "density": 0.1, "neighbours": False, "amounts": []},
    "xattention": {**FINE, "mass": 0.3},
    "spargeattn": {**FINE, "mass": 0.3, "similarity_gate": -1.0},
    "dit_fast_attn": {**FINE, "threshold": 100.0},
    "flashomni": {**FINE, "tau_q": 1.0, "power": 0.0},
}
SPARSE = sorted(set(SETTINGS) - {"dbcache", "flashomni"})


def test_methods_and_presets_are_told_apart_by_their_source():
    assert not set(methods()) & set(presets()) and len(methods()) >= 21
    assert len(SPARSE) >= 8 and set(SETTINGS) <= set(methods())
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
    assert report.flops_skipped > 0.05 and not any("nothing to gain" in x for x in report.notes)


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_method_is_sparse_in_every_step(name):
    """No step is left out; what its policy skips is skipped from the first sparse step on."""
    recipe = Recipe.of(name)
    assert recipe.policy.name == name and not recipe.policy.caches
    sparse = recipe.sparse
    static = name in ("sta", "radial")  # chosen once, by places alone
    assert sparse.choose_at == ((sparse.dense_steps,) if static else "computed")
    assert sparse.in_computed and sparse.carry == "off" and sparse.summaries == 0
    plan = recipe.plan(28)
    assert {kind.value for kind in plan.kinds} == {"full"} and sparse.dense_steps < 14


def test_the_page_names_every_file():
    """Each recipe, policy, schedule and forecast has its place in the table; trained ones too."""
    page = PAGE.read_text("utf-8")
    own = {"cached", "dense", "topk"}  # parts of recipes, and a benchmark's
    for name in (*methods(), *schedules(), *forecasts(), *set(policies()) - own):
        assert name in page, name
    for name in TRAINED:
        assert name.lower() in page.lower(), name


def test_every_recipe_of_the_page_is_one():
    found = list(page_of.recipes_of(PAGE.read_text("utf-8")))
    assert len(found) == len(set(found)) >= 16
    for name in found:
        Recipe.of(name.removesuffix(page_of.CALIBRATED))
    guided = list(page_of.recipes_of(PAGE.read_text("utf-8"), guided=True))
    assert len(guided) == 2 and not set(guided) & set(found)
    assert all(Recipe.of(name.removesuffix(page_of.GUIDED)).guidance for name in guided)


def test_the_tool_fills_cells_and_nothing_else():
    page = (
        "text\n\n| a | recipe | measured, picture |\n|---|---|---|\n"
        "| 1 | `fora` |  |\n| 2 | `x`, calibrated | y |\n| 3 | - | z |\n"
        "| 4 | `both` (true CFG) | v |\n| 5 | [own](files) | w |\n"
    )
    assert list(page_of.recipes_of(page)) == ["fora", "x, calibrated"]
    line = {
        "model": "tiny-image", "method": "fora", "psnr_db": "35.02", "psnr_error": "1.25",
        "worst_psnr_db": "30.0", "computed": "7.5", "flops_skipped": "0.7", "seconds": "2",
        "dense_seconds": "9", "speedup": "4.5", "attention_spent": "0.305",
    }  # fmt: skip
    odd = {**line, "method": "x, calibrated", "psnr_db": "not finite", "dense_seconds": "5"}
    last = {**line, "method": "own", "dense_seconds": "4", "measures": "clip=0.3 flip=0.0124"}
    other = {**line, "model": "other", "dense_seconds": "1"}
    both = {**line, "method": "both (true CFG)", "dense_seconds": "18"}  # two calls: 9x of its own
    cells = page_of.cells_of([line, odd, last, other, both])
    cell = "35.0 ± 1.2 / 30.0 dB, 7.5 computed, 70% skipped, attention 0.30, 2.50x"
    assert page_of.filled(page, cells) == page.replace("|  |", f"| {cell} |").replace(
        "| y |", "| not finite |"
    ).replace("| v |", f"| {cell.replace('2.50x', '9.00x')} |").replace(
        "| w |", f"| {cell.replace('7.5 c', 'FLIP 0.012, 7.5 c')} |"
    )
    wrong = dict.fromkeys(results.columns(Summed), "1") | {"attention_spent": "269335634.9"}
    with pytest.raises(ValueError, match=r"1, 1: attention_spent 2\.69336e"):
        sound([wrong])


def test_what_has_no_row_comes_first(tmp_path):
    """Each model has its own names; a file is known by its stem."""
    path = tmp_path / "rows.csv"
    line = {name: "1" for name in results.columns(Summed)}
    known = [{**line, "model": "a", "method": name} for name in ("fora", "tuned")]
    path.write_text(results.text(results.columns(Summed), known), "utf-8")
    options = Namespace(
        recipe=["fora", "pab", "a@x/tuned.json", "b@y/tuned.json"], peer=["steps=2", "b@steps=3"],
        ours=["tuned"], csv=path, missing_first=False,
    )  # fmt: skip
    plain = ["x/tuned.json", "steps=2", "fora", "pab"]
    assert [each.name for each in by_importance(options, "a")] == plain
    options.missing_first = True
    first = ["pab", "x/tuned.json", "steps=2", "fora"]
    assert [each.name for each in by_importance(options, "a")] == first
    other = ["fora", "pab", "y/tuned.json", "steps=2", "steps=3"]
    assert [each.name for each in by_importance(options, "b")] == other


def test_parts_of_a_comparison_are_put_together(tmp_path):
    """Times are medians over all pictures, and pairs are of all parts."""
    paths = [tmp_path / f"{part}.json" for part in range(2)]
    for part, path in enumerate(paths):
        pictures = [
            Picture(name, prompt, 0, decibel + prompt, 0.9, None, 5, 0.5, seconds=taken + prompt,
                    dense_seconds=9.0)
            for prompt in range(part, 4, 2)
            for name, decibel, taken in (("tuned-9", 40.0, 2.0), ("steps=9", 30.0, 1.0))
        ]  # fmt: skip
        families = {"tuned-9": "recipes", "steps=9": "stock"}
        keep(path, "tiny-image", Comparison.of_timed(pictures, families, "cpu, 2 threads", 5.0))
    found = together(paths)["tiny-image"]
    rows = {row.method: row for row in found.rows}
    assert (rows["tuned-9"].seconds, rows["steps=9"].seconds) == (3.5, 2.5)
    assert (rows["tuned-9"].psnr_db, rows["tuned-9"].prompts) == (41.5, 4)
    (equal,) = at_equal_time(found, ["tuned-9"])
    assert (equal.gain_db, equal.error_db, equal.line) == (10.0, 0.0, "steps")


@pytest.fixture(scope="module")
def loaded():
    return zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)


def calibration(loaded, **change):
    job = Generation(loaded, "a ring", 0, 7)
    job.call = {**job.call, "height": 64, "width": 64, **change}
    return calibrate(job)


def test_the_calibration_is_of_the_run(loaded):
    """A ratio a step, the first 1; a polynomial of degree 4; both are settings."""
    found = calibration(loaded)
    assert len(found["magcache"]["ratios"]) == 7 and found["magcache"]["ratios"][0] == 1.0
    assert len(found["teacache"]["coefficients"]) == 5
    for name, settings in found.items():
        assert Recipe.of(name, **settings).schedule.name == name
    assert not loaded.pipe.transformer._forward_hooks


def test_a_calibration_follows_each_call_of_guidance(loaded):
    """Two calls a step: a ratio a step, as of one call where both see the same."""
    same = {"true_cfg_scale": 3.0, "negative_prompt": "a ring"}
    plain, twice = calibration(loaded), calibration(loaded, **same)
    assert twice["magcache"]["ratios"] == pytest.approx(plain["magcache"]["ratios"], abs=2e-5)
    other = calibration(loaded, true_cfg_scale=3.0, negative_prompt="a small blue square")
    ratios = other["magcache"]["ratios"]
    assert len(ratios) == 7 and ratios != twice["magcache"]["ratios"]


def test_a_calibration_of_two_transformers_is_refused():
    pipe = SimpleNamespace(transformer_2=torch.nn.Linear(1, 1))
    with pytest.raises(NotImplementedError, match="transformer_2 that share its steps"):
        calibrate(SimpleNamespace(pipe=pipe))
