"""Evaluations: campaigns that go on where they stopped, true tables."""

import csv
import io
import json
import math

import pytest
import torch
from small_pipes import small
from typer.testing import CliRunner

from flashomni.cli import app
from flashomni.lab import metrics
from flashomni.lab.fidelity import Campaign, Result, parse_method, save_rows, summarise
from flashomni.lab.fidelity.campaign import ATTEMPTS, BRACKET
from flashomni.lab.fidelity.judged import CAP_DB, judged
from flashomni.lab.fidelity.page import frontier, pareto, write_page
from flashomni.lab.fidelity.scorers import load_scorer

COLUMNS = (
    "model", "recipe", "device", "seconds", "speedup", "psnr_db", "ssim", "lpips",
    "caption_score", "flops_skipped", "seeds", "commit",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return small()


def campaign(loaded, folder, methods=("fora:interval=2", "steps=4"), **options):
    settings = {"prompts": ["a red circle"], "seeds": [0], **options}
    return Campaign("small", loaded, [parse_method(m) for m in methods], folder=folder, **settings)


def brightness(reference, pixels, prompt):
    """A measure of ours."""
    return float(pixels.mean())


def test_a_campaign_has_the_measures_that_are_asked_for(loaded, tmp_path):
    """Those of ``flashomni compare``; asked for others, the pictures are made anew."""
    told = {"measures": {"light": f"{__name__}:brightness"}}
    run = campaign(loaded, tmp_path, ["steps=2"], **told)
    (found,) = run.run(silent)
    assert set(found.measures) == {"light"} and 0 < found.measures["light"] < 1
    (_, row) = summarise("m", run.results(), "")
    assert row.measures == f"light={found.measures['light']:.4f}"
    assert (row.flip == "") == (metrics.why_no_flip() is not None)
    assert not campaign(loaded, tmp_path, ["steps=2"]).results()


def silent(case):
    return lambda step, total: None


def result(method="fast", **changes):
    """A result as a campaign would give it."""
    values = {
        "method": method, "family": "presets", "prompt": "a", "seed": 0, "steps": 28,
        "seconds": 2.0, "dense_seconds": 5.0, "psnr_db": 40.0, "ssim": 0.9, "lpips": None,
        "temporal_db": None, "caption": (3, 4), "dense_caption": (4, 4), "flops_skipped": 0.5,
        "versions": {"device": "abacus", "commit": "c0ffee", "torch": "2", "diffusers": "0"},
    }  # fmt: skip
    return Result(**{**values, **changes})


def test_rounding_is_not_identical():
    """What differs by less than the decibels can say is not called the same bits."""
    reference = torch.full((1, 3, 16, 16), 0.5)
    near = judged(reference, reference + 6e-8, ("a", "b"), "", {})
    assert near.psnr_db == CAP_DB and not near.identical
    same = judged(reference, reference.clone(), ("a", "b"), "", {})
    assert same.psnr_db == CAP_DB and same.identical


@pytest.mark.slow
@pytest.mark.usefixtures("calm")
def test_a_campaign_goes_on_where_it_was_stopped(loaded, tmp_path):
    """Finished cases are read, not run again; more methods add cases; nothing is half-written."""
    first = campaign(loaded, tmp_path)
    runs = []

    def watch(case):
        runs.append(case.method.name)
        return lambda step, total: None

    done = list(first.run(watch))
    assert [r.method for r in done] == ["fora:interval=2", "steps=4"]
    assert runs == ["dense", "fora:interval=2", "steps=4", "dense"]
    assert done[0].steps == 8 and done[1].steps == 4
    assert done[0].flops_skipped > 0.2 and done[1].flops_skipped == 0.5

    runs.clear()
    again = campaign(loaded, tmp_path, ("fora:interval=2", "steps=4", "fora:interval=4"))
    assert list(again.run(watch))[:2] == done
    assert runs == ["dense", "fora:interval=4", "dense"]
    assert len(again.results()) == 3

    runs.clear()
    assert len(list(campaign(loaded, tmp_path, prompts=["a blue star"]).run(watch))) == 2
    assert "dense" in runs, "another prompt is another case"
    assert all(path.suffix in (".json", ".png") for path in (tmp_path / "cases").iterdir())


@pytest.mark.usefixtures("calm")
def test_a_cut_or_foreign_case_is_run_again(loaded, tmp_path):
    """Never a traceback, never another case's result."""
    once = campaign(loaded, tmp_path, ["steps=4"])
    list(once.run(silent))
    (path,) = (tmp_path / "cases").glob("*.json")
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "[]", "{}", whole.replace("a red circle", "a ring")):
        path.write_text(text)
        assert once.results() == []
    assert len(list(once.run(silent))) == 1 and len(once.results()) == 1


@pytest.mark.usefixtures("calm")
def test_other_weights_are_another_case(tmp_path):
    """A result of weights that have changed is not reused."""
    loaded = small()
    list(campaign(loaded, tmp_path, ["steps=4"]).run(silent))
    assert campaign(loaded, tmp_path, ["steps=4"]).results()
    with torch.no_grad():
        next(loaded.pipe.transformer.parameters()).add_(1)
    assert campaign(loaded, tmp_path, ["steps=4"]).results() == []


def test_a_dollar_in_a_name_is_no_formula():
    """A page is not lost over a method's name."""
    rows = summarise("m", [result("bad $\\\\frac{$ [/red]")], "cmd")
    pareto(rows).savefig(io.BytesIO(), format="png")


@pytest.fixture
def calm(monkeypatch):
    """Runs of milliseconds differ by more than a calm machine's runs of seconds."""
    monkeypatch.setattr("flashomni.lab.fidelity.campaign.UNREST", math.inf)


def test_a_disturbed_bracket_is_measured_again(loaded, tmp_path, monkeypatch):
    """Stock runs that differ too much speak of somebody else on the machine; there is an end."""
    monkeypatch.setattr("flashomni.lab.fidelity.campaign.UNREST", 0.0)
    order = []
    campaign_run = campaign(loaded, tmp_path, ["steps=4"]).run(
        lambda case: order.append(case.method.name) or (lambda step, total: None)
    )
    assert len(list(campaign_run)) == 1
    assert order == ["dense", *["steps=4", "dense"] * ATTEMPTS]


@pytest.mark.usefixtures("calm")
def test_the_stock_pipeline_brackets_the_methods(loaded, tmp_path):
    """At most a few methods run between two stock runs, whose mean is their baseline."""
    names = [f"steps={count}" for count in range(1, BRACKET + 2)]
    order = []
    found = list(
        campaign(loaded, tmp_path, names).run(
            lambda case: order.append(case.method.name) or (lambda step, total: None)
        )
    )
    assert order == ["dense", *names[:BRACKET], "dense", names[-1], "dense"]
    assert len({r.dense_seconds for r in found[:BRACKET]}) == 1
    assert all(r.seconds > 0 and r.dense_seconds > 0 for r in found)


@pytest.mark.usefixtures("calm")
def test_a_scorer_sees_frames_and_prompt(loaded, tmp_path):
    """Scores are kept beside the stock pipeline's; a result without them is measured again."""
    seen = []

    def judge(pixels, prompt):
        seen.append((tuple(pixels.shape), prompt))
        return 1, 2

    list(campaign(loaded, tmp_path, ["steps=4"]).run(silent))
    (scored,) = campaign(loaded, tmp_path, ["steps=4"], scorer=judge).run(silent)
    assert scored.caption == scored.dense_caption == (1, 2)
    assert seen == [((1, 3, 64, 64), "a red circle")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "methods must not be empty"),
        ({"methods": ("dense",)}, "methods must differ and leave out 'dense'"),
        ({"methods": ("fora", "fora")}, "methods must differ"),
        ({"prompts": []}, "prompts must not be empty"),
        ({"seeds": []}, "seeds must not be empty"),
    ],
)
def test_empty_campaigns(loaded, tmp_path, options, message):
    """Refused before anything is generated."""
    with pytest.raises(ValueError, match=message):
        campaign(loaded, tmp_path, **options)


def test_a_row_is_medians_of_times_and_means_of_fidelity():
    """By hand, with an identical picture and a lost statement."""
    results = [
        result(seconds=1.0, psnr_db=30.0, caption=(1, 4)),
        result(seconds=2.0, psnr_db=50.0, seed=1),
        result(seconds=9.0, psnr_db=None, seed=2),
    ]
    dense, row = summarise("m", results, "cmd")
    assert (dense.recipe, dense.speedup, dense.psnr_db) == ("dense", 1.0, "identical")
    assert dense.caption_score == 1.0
    assert (row.seconds, row.speedup) == (2.0, 2.5)
    assert (row.psnr_db, row.worst_psnr_db, row.psnr_error) == (40.0, 30.0, 10.0)
    assert row.caption_score == pytest.approx(7 / 12, abs=1e-4)
    assert (row.lpips, row.seeds, row.generations) == ("", "0 1 2", 3)
    only = summarise("m", [result(psnr_db=None)], "cmd")[1]
    assert only.psnr_db == only.worst_psnr_db == "identical"
    assert summarise("m", [], "cmd") == []


def test_rows_replace_older_rows_of_the_same_method(tmp_path):
    """Other models, methods and devices stay; other columns are refused."""
    path = tmp_path / "fidelity.csv"
    save_rows(summarise("m", [result(), result("slow")], "one"), path)
    save_rows(summarise("m", [result(seconds=1.0)], "two"), path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(COLUMNS)] == COLUMNS
    assert {r["recipe"]: r["command"] for r in rows} == {
        "slow": "one",
        "dense": "two",
        "fast": "two",
    }
    assert next(r for r in rows if r["recipe"] == "fast")["seconds"] == "1.0"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns; allowed are model, recipe"):
        save_rows(summarise("m", [result()], "three"), path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_frontier_is_what_nothing_beats():
    """Beaten in both: out. Better in one: in."""
    rows = summarise(
        "m",
        [
            result("a", seconds=1.0, psnr_db=30.0),
            result("b", seconds=2.0, psnr_db=40.0),
            result("c", seconds=2.5, psnr_db=35.0),
            result("d", seconds=4.0, psnr_db=50.0),
        ],
        "cmd",
    )[1:]
    assert [row.recipe for row in frontier(rows, "speedup")] == ["d", "b", "a"]


def test_the_page_is_whole_and_escaped(loaded, tmp_path):
    """One file with its pictures inside; what a user typed is text."""
    some = campaign(loaded, tmp_path, prompts=["<script>alert(1)</script>"])
    rows = summarise("small", list(some.run(silent)), "flashomni eval <b>")
    page = write_page(some, rows, tmp_path, "flashomni eval <b>").read_text()
    assert "<script>" not in page and "eval &lt;b&gt;" in page
    assert page.count("data:image/png;base64,") == 3 and "steps=4" in page
    assert (metrics.why_no_lpips() is None) or "LPIPS was not measured" in page


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", "scorer must be MODULE:FUNCTION, got 'math'"),
        ("math:no_such", "is not a function of math"),
        ("math:pi", "is not a function of math"),
        ("no_such_module:f", "cannot be imported"),
    ],
)
def test_wrong_scorers(name, message):
    """Refused with what is expected."""
    with pytest.raises(ValueError, match=message):
        load_scorer(name)
    assert load_scorer("math:hypot") is math.hypot


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """Rows, page and pictures appear; a second call runs nothing and gives the same rows."""
    stored = small()
    stored.pipe.save_pretrained(tmp_path / "model")
    note = {"prompt": "a ring", "prompts": ["a ring", "a star"], "call": stored.call}
    (tmp_path / "model" / "flashomni.json").write_text(json.dumps(note))
    arguments = [
        "eval", "--model", tmp_path / "model", "--method", "fora", "--method", "steps=4",
        "--count", 2, "--out", tmp_path / "out", "--csv", tmp_path / "all.csv",
    ]  # fmt: skip
    for _ in range(2):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        assert "LPIPS not measured" in done.output or metrics.why_no_lpips() is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"cases", "fidelity.csv", "flip.png", "index.html", "pareto.png", "sheet.png"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<th>SSIM</th>" in page and "<th>caption</th>" not in page  # of no row
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["recipe"] for r in rows] == ["dense", "fora", "steps=4"]
    assert all(r["generations"] == "2" for r in rows)
