"""The tables of later models at real size are those of their rows."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from flashomni.engine import Recipe
from flashomni.lab import results
from flashomni.lab.e2e.table import GenerationRow

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import real_sizes
import wan22
from wan22 import Row as WanRow

ABOUT = {"gpu": "card", "torch": "2", "triton": "3", "commit": "abc1234", "command": "bench"}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    for name in ("LATER", "WAN"):
        monkeypatch.setattr(real_sizes, name, tmp_path / f"{name}.csv")
    return tmp_path


def timed(recipe, kind, ms, speedup, model="hunyuan15-720p"):
    return GenerationRow(
        model=model, tokens=111856, recipe=recipe, density=0.5, step_kind=kind, ms=ms,
        generation_s=12.5, baseline="eager", baseline_s=25.0, speedup=speedup, peak_gib=None,
        **ABOUT,
    )  # fmt: skip


def test_the_page_is_that_of_the_rows():
    """Nobody edits the tables by hand."""
    text = real_sizes.PAGE.read_text("utf-8")
    assert real_sizes.page(text) == text and text.count(real_sizes.BEGIN) == 1


def test_rows_become_tables(kept, tmp_path):
    """Kinds of steps in one line; a second run replaces the rows of its model and recipe alone."""
    first = [timed("lossless", "full", 1234.5, 1.5), timed("lossless", "generation", 900, 1.5)]
    other = [timed("balanced", "generation", 300.0, 4.0, "flux2-1024")]
    results.append(tmp_path / "a.csv", [*first, *other])
    real_sizes.take(tmp_path / "a.csv", real_sizes.LATER, GenerationRow, ("model", "recipe"))
    again = [dataclasses.replace(row, speedup=1.75) for row in first]
    results.append(tmp_path / "b.csv", again)
    real_sizes.take(tmp_path / "b.csv", real_sizes.LATER, GenerationRow, ("model", "recipe"))
    wan = WanRow(
        "wan22", 75600, 40, "fora", 12, 24, 8, 70.5, 8000.0, 192.0, True, 2.72, 7900.0, 15.25,
        0.66, 71.5, **ABOUT,
    )  # fmt: skip
    results.append(real_sizes.WAN, [wan])
    text = real_sizes.page(f"a\n{real_sizes.BEGIN}\nold\n{real_sizes.END}\nb\n")
    assert text.startswith("a\n") and text.endswith(f"{real_sizes.END}\nb\n") and "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| `balanced` |  | 12.50 s | 4.00x | 0.500 |  |" in lines[2]
    assert "6 of the 54 blocks" in lines[3] and "Full 1,234.5" in lines[3] and "1.75x" in lines[3]
    assert "1.50x" not in text and "40 of 40 blocks" in lines[-1] and "2.72x" in lines[-1]
    assert len({line.count("|") for line in lines[-3:]}) == 1


@pytest.mark.slow
def test_wan_is_generated_whole(tmp_path, monkeypatch, capsys):
    """A small one: stock first, then the steps asked for, each of them in its transformer."""
    path = tmp_path / "wan.csv"
    command = ["wan22.py", "--device", "cpu", "--steps", "8", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", [*command, "--recipes", "fora:interval=3,warmup=0"])
    wan22.main()
    said = capsys.readouterr().out
    assert "lossless: 0.0e+00" in said and "step 8 of 8" in said and "transformer_2:" in said
    (row,) = results.read(path, WanRow)
    assert (row["steps"], row["calls"], row["blocks"], row["estimated"]) == ("8", "16", "2", "True")
    assert 0 < int(row["computed"]) < 16 and float(row["flops_skipped"]) > 0.2


def test_steps_are_as_many_as_there_is_time_for():
    """Fewer steps where fewer calls may be computed; none where not even the fewest fit."""
    model = wan22.built(torch.device("cpu"), 1)
    recipe = Recipe.of("fora:interval=3,warmup=0")
    steps, computed = wan22.steps_for(model, recipe, 40, 1000)
    assert steps == 40 and model.calls * 13 < computed < model.calls * 20
    fewer, some = wan22.steps_for(model, recipe, 40, computed - 1)
    assert fewer < 40 and some < computed and wan22.steps_for(model, recipe, 40, 1) == (0, 0)


def test_a_csv_of_something_else_is_refused(kept, tmp_path):
    """By its columns; what was kept stays."""
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        real_sizes.take(tmp_path / "x.csv", real_sizes.WAN, WanRow, ("recipe",))
    assert not real_sizes.WAN.exists()
