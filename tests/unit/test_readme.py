"""The README is run; test_docs.py has what is asked of every page."""

import re
from pathlib import Path

import pytest

import flashomni
from flashomni.lab import zoo

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader would type them, on a FLUX of random weights."""
    import diffusers

    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.default_sample_size = 32
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    scope = {}
    found = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 2
    for example in found:
        exec(compile(example, "README.md", "exec"), scope)
    assert scope["image"].size and "FLOPs" in capsys.readouterr().out
    assert flashomni.engine_of(pipe) is scope["engine"]
    assert scope["engine"].recipe == scope["same"].replace(name=scope["engine"].recipe.name)
    assert flashomni.Recipe.of("mine.json") == scope["same"]


def test_it_is_short():
    """One table of results, one picture, and the way to everything else."""
    assert len(README.splitlines()) <= 130


def test_its_targets_exist():
    """What it tells to make, the Makefile makes."""
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    assert {"demo", "quick", "test", "docs"} <= {first or second for first, second in told}
    assert {first or second for first, second in told} <= set(known)


def test_its_rows_name_their_commits():
    """Every row of results says of which version and commit it is."""
    table = README.partition("| model | machine |")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == 5
    assert all(re.search(r"0\.\d, `[0-9a-f]{7}`", row) for row in rows)
