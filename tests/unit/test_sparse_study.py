"""The study of sparse attention: pairs, means, what it says of numbers that are known."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest

from flashomni.lab import zoo
from flashomni.policies import policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("sparse", "_sparse_page"):
        sys.modules.pop(name, None)


def measured(method, prompt, psnr, spent, **changes):
    from _paired import Measured

    row = Measured(
        "tiny-image", method, prompt, 0, 28, psnr, 0.01, spent, 0.3, None, "float32", "abacus",
        "c0ffee", "2", "0",
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def test_means_have_their_standard_error():
    from _paired import Mean

    mean = Mean.of([1.0, 2.0, 6.0])
    assert mean.value == 3.0 and mean.error == pytest.approx(math.sqrt(7.0 / 3)) and mean.count == 3
    assert str(mean) == "3.0 ± 1.5" and str(Mean.of([4.0])) == "4.0" and str(Mean.of([])) == ""


def test_only_whole_pairs_count():
    """A pair that lacks a method says nothing of any; identical bits are 99 dB."""
    from _paired import Table

    rows = [
        measured("a", 0, 30.0, 0.5), measured("b", 0, math.inf, 0.3), measured("a", 1, 20.0, 0.5),
    ]  # fmt: skip
    table = Table(rows, ["a", "b"])
    assert table.pairs == [(0, 0)] and table.psnr("a") == [30.0] and table.psnr("b") == [99.0]
    assert Table(rows, ["a"]).pairs == [(0, 0), (1, 0)]


@pytest.mark.parametrize(
    ("spent", "expected"), [(0.4, 30.0), (0.3, 25.0), (0.1, 20.0), (0.9, 40.0), (0.5, 35.0)]
)
def test_between_two_methods(spent, expected):
    """On the line between them, and no further than its ends."""
    from _paired import Table

    rows = [measured(str(x), 0, y, x) for x, y in ((0.2, 20.0), (0.4, 30.0), (0.6, 40.0))]
    assert Table(rows, ["0.2"]).between(["0.6", "0.2", "0.4"], spent) == [pytest.approx(expected)]


def test_cost_is_time_where_it_is_asked_for():
    from _paired import Table

    rows = [measured("a", 0, 30.0, 0.5, time=0.7), measured("b", 0, 40.0, 0.6, time=0.9)]
    assert Table(rows, ["a"]).cost("a") == 0.5 and Table(rows, ["a"], True).cost("a") == 0.7
    assert Table(rows, ["a"], True).between(["a", "b"], 0.8) == [pytest.approx(35.0)]


def test_the_file_goes_on_where_it_was_cut(tmp_path):
    from _paired import read

    path = tmp_path / "measured.jsonl"
    assert read(path) == []
    import json

    row = measured("a", 0, 30.0, 0.5)
    path.write_text(json.dumps(dataclasses.asdict(row)) + '\n{"model": "tiny-im')
    assert read(path) == [row]


def test_pairs_take_every_prompt_first():
    from _paired import pairs

    assert [(n, s) for (n, _), s in pairs(["x", "y"], [0, 1])] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_what_the_page_says(tmp_path):
    """Gains over today's way at equal spent, the best of each rule, from made-up numbers."""
    import sparse
    from _paired import Table
    from _sparse_page import write

    asked = list(sparse.points("tiny-image"))
    larger = sparse.points("tiny-image@512x512")
    assert {p.series.split(",")[0] for p in larger} >= {"spargeattn", "window"} and not [
        point for point in sparse.points("tiny-image@512x512") if point.series.startswith("radial")
    ]
    rows = []
    for prompt in (0, 1):
        for number, point in enumerate(asked):
            density = next((d for d in sparse.DENSITIES if f"kv_density={d}," in point.method), 0.3)
            spent = 0.14 + 0.86 * density
            psnr = 20 + 10 * spent + prompt + 15 * ("carry" in point.series) + 0.01 * number
            rows.append(measured(point.method, prompt, psnr, spent))
    tables = {"tiny-image": Table(rows, [point.method for point in asked])}
    write(sparse.STUDY, asked, tables, tmp_path / "work", tmp_path, "python studies/sparse.py")
    text = (tmp_path / "sparse.md").read_text()
    assert "| tiny-image | 0.40 |" in text and "2 pairs of 2 prompts of tiny-image" in text
    best = next(line for line in text.splitlines() if line.startswith("| tiny-image | 0.47 |"))
    gain = float(best.rpartition("|")[0].rpartition("|")[2].split()[0])
    assert 13 < gain < 16
    assert {p.suffix for p in tmp_path.iterdir()} == {".md", ".png", ".csv"}
    assert (tmp_path / "sparse.csv").read_text().count("\n") == len(asked) + 1


@pytest.mark.slow
def test_it_measures_keeps_and_goes_on(monkeypatch, tmp_path):
    """A pipeline of random weights: each method once; a second call measures nothing."""
    import sparse

    def small(name, device, dtype):
        loaded = zoo.random_pipeline(name, heads=1, head_dim=16, dual=1, single=1)
        prompts = zoo.read_note(zoo.bundled(name))["prompts"]
        call = {**loaded.call, "height": 64, "width": 64}
        return dataclasses.replace(loaded, call=call, prompts=prompts)

    wanted = ("today", "+ carry, refresh 4")
    whole = list(sparse.points("tiny-image"))
    some = [next(p for p in whole if p.series == series) for series in wanted]
    monkeypatch.setattr(sparse.zoo, "load", small)
    monkeypatch.setattr(sparse, "points", lambda model: iter(some))
    options = sparse.Options("cpu", ("tiny-image",), 1, (0,), 6, 600.0, tmp_path)
    before = sorted(policies())
    first = sparse.run(options, {"tiny-image": some})["tiny-image"]
    assert first.pairs == [(0, 0)] and all(0 < first.cost(p.method) <= 1 for p in some)
    lines = (tmp_path / "measured.jsonl").read_text()
    again = sparse.run(options, {"tiny-image": some})["tiny-image"]
    assert again.pairs == first.pairs and (tmp_path / "measured.jsonl").read_text() == lines
    assert sorted(policies()) == before and (tmp_path / "tiny-image-agreement.json").exists()
