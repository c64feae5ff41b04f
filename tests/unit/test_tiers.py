"""Both tiers give the same pictures, and the table of what an adapter is worth is of its rows."""

import argparse
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import flashomni

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import tiers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_the_page_is_that_of_the_rows():
    """Nobody edits the table by hand."""
    text = tiers.PAGE.read_text("utf-8")
    assert tiers.page(text) == text and text.count(tiers.BEGIN) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", tiers.CASES)
def test_layers_cached_whole_are_the_same_without_the_adapter(case):
    """Of the same weights and noise, the forecasts of both are the same pictures."""
    _, models, given = tiers.made(case, CPU)
    shared = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared) and models[0] is not models[1]
    stock = tiers.generation(models[0], given, 5)
    assert torch.equal(stock, tiers.generation(models[1], given, 5))
    a, c = tiers.compared("taylorseer", models, given, 5, 1)
    off = (stock - a["out"]).norm()
    assert (a["tier"], c["tier"]) == ("A", "C") and off > 1e-3 * stock.norm()
    assert (a["out"] - c["out"]).norm() < 1e-5 * off
    assert [flashomni.engine_of(model) for model in models] == [None, None]


def test_rows_and_their_table(tmp_path, monkeypatch):
    """One class through the CSV to the page; what the two differ in is measured."""
    args = argparse.Namespace(
        device="cpu", steps=4, rounds=1, recipes=["lossless", "topk"], models=["wan"]
    )
    rows = [row for found in tiers.measure("wan", args, float("inf")) for row in found]
    assert [(row.recipe, row.tier) for row in rows] == [
        ("lossless", "A"), ("lossless", "C"), ("topk", "A"), ("topk", "C"),
    ]  # fmt: skip
    exact, sparse = rows[:2], rows[2:]
    assert all(row.error < 1e-6 and row.between < 1e-6 for row in exact)
    assert all(row.error > 1e-4 for row in sparse) and rows[0].tokens == 5 * 9 * 7
    assert min(row.ms for row in rows) > 0 and rows[0].blocks == 3
    monkeypatch.setattr(tiers, "KEPT", tmp_path / "tiers.csv")
    rows[2:] = [dataclasses.replace(row, between=0.002, psnr_db=51.4) for row in sparse]
    tiers.Book(tiers.KEPT, tiers.Row).write(rows)
    section = tiers.page(f"before\n{tiers.BEGIN}\nold\n{tiers.END}\nafter\n")
    assert section.startswith("before\n") and section.endswith(f"{tiers.END}\nafter\n")
    lines = [line for line in section.splitlines() if line.startswith("| small")]
    assert len(lines) == 2 and "old" not in section
    assert "2.0e-03, 51 dB" in lines[1] and "(315 tokens, 3 blocks)" in lines[0]


def test_a_run_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    """Those of a model and recipe; the table says what each model was measured on."""
    about = dict.fromkeys(("gpu", "torch", "triton", "commit", "command"), "old")
    old = tiers.Row(
        "FLUX", 4608, 57, "topk", "A", 10, 9.0, 8.0, 9.0, 1.0, 0.1, 0.0, 0.0, 60.0, **about
    )
    pair = [old, dataclasses.replace(old, tier="C", ms=6.0)]
    other = [dataclasses.replace(row, model="Wan") for row in pair]
    new = [dataclasses.replace(row, model="Wan", gpu="new", ms=3.0) for row in pair]
    monkeypatch.setattr(tiers, "KEPT", tmp_path / "kept.csv")
    tiers.Book(tiers.KEPT, tiers.Row).write([*pair, *other])
    tiers.Book(tmp_path / "run.csv", tiers.Row).write(new)
    tiers.taken(tmp_path / "run.csv")
    rows = tiers.read(tiers.KEPT, tiers.Row)
    assert [(row["model"], row["gpu"]) for row in rows] == [("FLUX", "old")] * 2 + [
        ("Wan", "new")
    ] * 2
    text = tiers.table(rows)
    assert "FLUX: old, torch old, 10 steps; Wan: new, torch old, 10 steps; bf16" in text
