"""The study of sparse attention: pairs, means, what it says of numbers that are known."""

import csv
import dataclasses
import math
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from flashomni.lab import zoo
from flashomni.policies import policies

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    monkeypatch.syspath_prepend(str(ROOT))
    for name in ("sparse", "_sparse_page", "_sparse_long"):
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

    mean = Mean.of({(0, 0): 1.0, (1, 0): 2.0, (2, 0): 6.0})
    assert mean.value == 3.0 and mean.error == pytest.approx(math.sqrt(7.0 / 3)) and mean.count == 3
    assert str(mean) == "3.0 ± 1.5" and str(Mean.of({(0, 0): 4.0})) == "4.0"
    assert str(Mean.of({})) == ""


def test_seeds_of_a_prompt_are_no_independent_pairs():
    """Errors are over prompts; a prompt of two seeds weighs as much as one of one."""
    from _paired import Mean

    mean = Mean.of({(0, 0): 10.0, (0, 1): 14.0, (1, 0): 20.0})
    assert mean == Mean(16.0, 4.0, 3, 2)
    alone = Mean.of({(0, 0): 10.0, (0, 1): 14.0})
    assert alone.value == 12.0 and math.isnan(alone.error) and str(alone) == "12.0"


def test_of_how_many_prompts_pairs_are():
    """More pairs than prompts are no fraction of them."""
    from _paired import Mean

    assert Mean.of({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0}).counted == "3 (2)"


def test_differences_are_of_pairs_that_both_have():
    """Identical bits are 99 dB."""
    from _paired import Table, minus

    rows = [
        measured("a", 0, 30.0, 0.5), measured("b", 0, math.inf, 0.3), measured("a", 1, 20.0, 0.5),
    ]  # fmt: skip
    table = Table(rows)
    assert table.pairs("a") == [(0, 0), (1, 0)] and table.pairs("c") == []
    assert table.psnr("a") == {(0, 0): 30.0, (1, 0): 20.0} and table.psnr("b") == {(0, 0): 99.0}
    assert minus(table.psnr("b"), table.psnr("a")) == {(0, 0): 69.0}


@pytest.mark.parametrize(
    ("spent", "expected"), [(0.4, 30.0), (0.3, 25.0), (0.1, 20.0), (0.9, 40.0), (0.5, 35.0)]
)
def test_between_two_methods(spent, expected):
    """On the line between them, and no further than its ends."""
    from _paired import Table

    rows = [measured(str(x), 0, y, x) for x, y in ((0.2, 20.0), (0.4, 30.0), (0.6, 40.0))]
    found = Table(rows).between(["0.6", "0.2", "0.4"], spent)
    assert found == {(0, 0): pytest.approx(expected)}


def test_between_needs_only_its_two_methods():
    """A pair that lacks a third one counts; one that lacks either does not."""
    from _paired import Table

    rows = [
        measured("low", 0, 20.0, 0.2), measured("mid", 0, 30.0, 0.4),
        measured("high", 0, 40.0, 0.6), measured("low", 1, 22.0, 0.2),
        measured("mid", 1, 34.0, 0.4), measured("mid", 2, 9.0, 0.4),
    ]  # fmt: skip
    table = Table(rows)
    three = ["low", "mid", "high"]
    assert table.between(three, 0.3) == pytest.approx({(0, 0): 25.0, (1, 0): 28.0})
    assert table.between(three, 0.5) == pytest.approx({(0, 0): 35.0})


def test_cost_is_time_where_it_is_asked_for():
    from _paired import Table

    rows = [measured("a", 0, 30.0, 0.5, time=0.7), measured("b", 0, 40.0, 0.6, time=0.9)]
    assert Table(rows).cost("a") == 0.5 and Table(rows, True).cost("a") == 0.7
    assert Table(rows, True).between(["a", "b"], 0.8) == {(0, 0): pytest.approx(35.0)}


def test_what_nobody_timed_costs_no_number():
    """Times of other methods, or none, are nobody's; a pair's last timing counts once."""
    from _paired import Table

    rows = [
        measured("a", 0, 30.0, 0.5, time=0.9), measured("a", 0, 30.0, 0.5, time=0.7),
        measured("a", 0, 30.0, 0.5), measured("a", 1, 31.0, 0.5), measured("b", 0, 40.0, 0.6),
    ]  # fmt: skip
    table = Table(rows, True)
    assert table.cost("a") == 0.7 and len(table.psnr("a")) == 2
    with pytest.raises(ValueError, match="nobody timed b"):
        table.cost("b")
    with pytest.raises(ValueError, match="nobody measured c"):
        Table(rows).cost("c")


def test_the_file_goes_on_where_it_was_cut(tmp_path):
    import json
    import time

    from _paired import Runner, read
    from rich.progress import Progress

    path = tmp_path / "measured.jsonl"
    assert read(path) == []
    row = measured("a", 0, 30.0, 0.5)
    path.write_text(json.dumps(dataclasses.asdict(row)) + '\n{"model": "tiny-im')
    assert read(path) == [row]
    more = [measured("b", number, 30.0, 0.5) for number in range(2)]
    for each in more:
        Runner(tmp_path, time.monotonic(), Progress())._keep(each)
    assert read(path) == [row, *more]


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
    tables = {"tiny-image": Table(rows)}
    assert sparse.reached(asked, tables["tiny-image"]) == asked
    assert sparse.reached(asked, Table(rows[:-1]))[-1] == asked[-2]
    assert sparse.reached(asked, Table(rows, True)) == []
    write(sparse.STUDY, asked, tables, tmp_path / "work", tmp_path, "python studies/sparse.py")
    text = (tmp_path / "sparse.md").read_text()
    assert "| tiny-image | 0.40 |" in text and "| 2 (2) |" in text
    best = next(line for line in text.splitlines() if line.startswith("| tiny-image | 0.47 |"))
    gain = float(best.rpartition("|")[0].rpartition("|")[2].split()[0])
    assert 13 < gain < 16
    assert {p.suffix for p in tmp_path.iterdir()} == {".md", ".png", ".csv"}
    assert (tmp_path / "sparse.csv").read_text().count("\n") == len(asked) + 1


def test_series_and_methods_are_chosen():
    """Today's way is among them where anything is compared with it."""
    import sparse

    points = list(sparse.points("tiny-video"))
    some = sparse.chosen(points, "+ carry, refresh 4;caching", "density=0.(22|125),|^taylor")
    today = [p for p in points if p.series == "today"]
    assert [p for p in some if p.series == "today"] == today and sparse.chosen(
        points, "", ""
    ) == points
    ours = [p.method for p in some if p.series == "+ carry, refresh 4"]
    assert ["kv_density=0.125" in ours[0], "kv_density=0.22" in ours[1], len(ours)] == [1, 1, 2]
    assert sum(p.series == "caching" for p in some) == len(sparse.RAMPS)
    assert len(some) == len(today) + 2 + len(sparse.RAMPS)
    ramps = sparse.chosen(points, "caching;caching + sparse 0.25, refresh 3", r"computed=(7|11)\b")
    assert [p.series for p in ramps] == ["caching", "caching", "caching + sparse 0.25, refresh 3"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("topk:interval=1,warmup=0", "d" * 12),
        ("taylorseer:steps=[0,1,4,11],of=12", "dd--d------d"),
        ("topk:steps=[0,1,2,4,8,11],of=12,in_computed=true,dense_steps=1,choose_at=[0],"
         "carry=hold,refresh=3,degrade_below=1", "css-r---s--s"),
        ("topk:interval=1,warmup=0,in_computed=true,dense_steps=2,choose_at=[1],carry=hold,"
         "refresh=4", "dcsssrsssrss"),
    ],
)  # fmt: skip
def test_what_kinds_of_step_a_method_has(method, expected):
    from _sparse_long import steps_of

    assert steps_of(method, 12) == expected


def test_steps_have_their_measured_times(tmp_path):
    """Of rows written out; generations without caching choose elsewhere and do not count."""
    from _sparse_long import times

    rows = [
        ("lossless", "full", 100), ("lossless", "dispatch", 102), ("lossless", "generation", 9),
        ("topk:degrade_below=1", "full, refresh", 120), ("topk:degrade_below=1", "dispatch", 1),
        ("topk:degrade_below=1", "update, refresh", 110), ("topk:interval=1,a", "full, sparse", 7),
        ("topk:degrade_below=1", "full, sparse", 50), ("topk:degrade_below=1", "generation", 9),
        ("topk:degrade_below=1,b", "full, refresh", 110), ("taylorseer:computed=9", "dispatch", 3),
    ]  # fmt: skip
    lines = ["recipe,step_kind,ms", *(f'"{r}","{kind}",{ms}' for r, kind, ms in rows)]
    path = tmp_path / "times.csv"
    path.write_text("\n".join(lines))
    assert times(path) == {"d": 101, "c": 120, "r": 110, "s": 50, "-": 1}
    assert 0.5 < times()["s"] / times()["d"] < 0.7


def test_steps_of_more_tokens():
    """Half of a step is attention, of which a sparse one has a fifth: with three times as many
    tokens three quarters are, and what is saved grows likewise."""
    from _sparse_long import longer

    ms = {"d": 100.0, "s": 60.0, "r": 110.0, "-": 1.0}
    assert longer(ms, 1.0, 0.5) == pytest.approx({"d": 1, "s": 0.6, "r": 1.1, "-": 0})
    assert longer(ms, 3.0, 0.5) == pytest.approx({"d": 1, "s": 0.4, "r": 1.15, "-": 0})


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
    assert all(first.pairs(p.method) == [(0, 0)] for p in some)
    assert all(0 < first.cost(p.method) <= 1 for p in some)
    lines = (tmp_path / "measured.jsonl").read_text()
    again = sparse.run(options, {"tiny-image": some})["tiny-image"]
    assert all(again.row(p.method) == first.row(p.method) for p in some)
    assert (tmp_path / "measured.jsonl").read_text() == lines
    timed = sparse.run(dataclasses.replace(options, timed=1), {"tiny-image": some[:1]})
    assert timed["tiny-image"].cost(some[0].method) > 0
    assert sparse.reached(some, timed["tiny-image"]) == some[:1]
    assert sorted(policies()) == before and (tmp_path / "tiny-image-agreement.json").exists()


def test_the_page_of_long_clips_is_what_its_rows_say():
    """Word by word, so that a change of its maker is a change of the page."""
    from _sparse_long import page, times

    def read(cell):
        with suppress(ValueError):
            return float(cell)
        return cell

    pages = ROOT / "docs" / "studies"
    with (pages / "sparse_long.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: read(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    for row in rows:
        row |= {name: int(row[name]) for name in ("pairs", "prompts")}
    made = page(rows, times(), "python studies/sparse.py --long")
    assert made == (pages / "sparse_long.md").read_text("utf-8")
