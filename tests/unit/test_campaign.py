"""Campaigns that are stopped, fail or share a folder lose nothing; what a result depends on."""

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_pipes import small
from test_evaluation import calm, campaign, result, silent  # noqa: F401

from flashomni.lab import metrics
from flashomni.lab.fidelity import parse_method, summarise
from flashomni.lab.fidelity.campaign import BRACKET
from flashomni.lab.fidelity.identity import foreign_code, weights_digest
from flashomni.lab.fidelity.page import write_page


@pytest.fixture(scope="module")
def loaded():
    return small()


class Stop(Exception):
    """Somebody has had enough."""


def stopping_at(number, kind):
    """A watch that raises in the middle of a generation; and the methods of those before it."""
    finished = []

    def watch(case):
        def on_step(step, total):
            if len(finished) == number and step == 2:
                raise kind
            if step == total:
                finished.append(case.method.name)

        return on_step

    return finished, watch


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("number", [2, 4, 6])
def test_stopping_keeps_every_finished_generation(loaded, tmp_path, number, kind):
    """Also those of a bracket that is still open; they say that it was."""
    methods = [f"steps={count}" for count in range(2, 7)]
    finished, watch = stopping_at(number, kind)
    stopped = campaign(loaded, tmp_path, methods)
    with pytest.raises(kind):
        list(stopped.run(watch))
    kept = stopped.results()
    assert [r.method for r in kept] == [name for name in finished if name != "dense"]
    assert all(r.dense_seconds > 0 and r.psnr_db for r in kept)
    assert all(r.bracketed for r in kept[:BRACKET]) == (number == 6)
    again, watch = stopping_at(99, kind)
    found = list(campaign(loaded, tmp_path, methods).run(watch))
    assert sorted(r.method for r in found) == methods
    assert set(again) - {"dense"} == set(methods) - {r.method for r in kept}


@pytest.mark.usefixtures("calm")
def test_a_failing_scorer_costs_no_generation(loaded, tmp_path):
    """What was generated is kept, and scored when the scorer works again, from the same pixels."""
    seen = []

    def broken(pixels, prompt):
        seen.append(pixels)
        raise Stop("no glasses")

    with pytest.raises(RuntimeError, match=r"the scorer failed \(Stop: no glasses\)"):
        list(campaign(loaded, tmp_path, scorer=broken).run(silent))
    assert len(campaign(loaded, tmp_path, scorer=broken).results()) == 2
    same = []

    def judge(pixels, prompt):
        same.append(pixels)
        return 2, 3

    order = []
    scored = list(
        campaign(loaded, tmp_path, scorer=judge).run(lambda case: order.append(case) or None)
    )
    assert order == [] and [r.caption for r in scored] == [(2, 3)] * 2
    assert torch.equal(same[0], seen[0]), "not the rounded picture"
    assert all(path.suffix in (".json", ".png") for path in (tmp_path / "cases").iterdir())


@pytest.mark.usefixtures("calm")
def test_another_scorer_is_another_score(loaded, tmp_path):
    """A score is not taken for that of another function, nor of an edited file."""

    def make(right):
        return lambda pixels, prompt: (right, 9)

    for right in (1, 2):
        (found,) = campaign(loaded, tmp_path, ["steps=4"], scorer=make(right)).run(silent)
        assert found.caption == (right, 9)
    (plain,) = campaign(loaded, tmp_path, ["steps=4"]).results()
    assert plain.caption is None


@pytest.mark.usefixtures("calm")
def test_a_picture_that_is_not_finite_is_a_row_that_says_so(loaded, tmp_path, monkeypatch):
    """The campaign goes on; nothing flatters the method; the page can be drawn."""
    from flashomni.lab import generation

    frames, count = generation.frames, []

    def spoil(output):
        count.append(None)
        return frames(output) * (float("nan") if len(count) == 3 else 1.0)

    some = campaign(loaded, tmp_path, ["steps=4", "steps=5"])
    monkeypatch.setattr(generation, "frames", spoil)
    bad, good = list(some.run(silent))
    if bad.failure is None:  # warm-ups come first
        bad, good = good, bad
    assert "not finite" in bad.failure and bad.psnr_db is None and bad.ssim is None
    assert good.failure is None and good.psnr_db > 0
    rows = {row.recipe: row for row in summarise("m", [bad, good], "cmd")}
    assert rows[bad.method].psnr_db == rows[bad.method].worst_psnr_db == "not finite"
    page = write_page(some, list(rows.values()), tmp_path, "cmd").read_text()
    assert f"{bad.method}, &#x27;a red circle&#x27;, seed 0: " in page
    order = []
    list(campaign(loaded, tmp_path, ["steps=4", "steps=5"]).run(lambda c: order.append(c)))
    assert order == [], "a failure is a result"


def test_pictures_too_small_for_ssim_have_a_psnr(loaded, tmp_path):
    """11 x 11 pixels are SSIM's window: of fewer, what can be said is said."""
    picture = torch.rand(1, 3, 8, 8) * 0.5
    distance = metrics.compare(picture, picture + 0.1, ("dense", "fast"))
    assert distance.psnr_db == pytest.approx(20.0, abs=1e-3) and distance.ssim is None
    assert "11 x 11" in distance.notes[0]
    assert summarise("m", [result(ssim=None)], "cmd")[1].ssim == ""


DIGEST = """
import sys
sys.path.insert(0, sys.argv[1])
from small_pipes import small
from flashomni.lab.fidelity.identity import weights_digest
print(weights_digest(small().pipe))
"""


@pytest.mark.slow
def test_the_weights_have_one_digest_in_every_program(loaded):
    """Whatever the order of sets, before and after a generation; else nothing is ever found."""
    digests = [weights_digest(loaded.pipe)]
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    digests.append(done.stdout.split()[-1])
    assert len(set(digests)) == 1


def test_a_vocabulary_is_part_of_the_digest():
    """Other ids of the same words are other pictures."""
    loaded = small()
    before = weights_digest(loaded.pipe)
    loaded.pipe.tokenizer("a red circle", padding="max_length", truncation=True)
    assert weights_digest(loaded.pipe) == before, "how it was last called is not"
    loaded.pipe.tokenizer.add_tokens(["hexagon"])
    assert weights_digest(loaded.pipe) != before


def test_offloaded_weights_are_read():
    """A module that accelerate has emptied counts for what it will hold."""
    from accelerate import cpu_offload

    digests = []
    for shift in (0.0, 0.0, 1.0):
        loaded, told = small(), []
        with torch.no_grad():
            next(loaded.pipe.transformer.parameters()).add_(shift)
        cpu_offload(loaded.pipe.transformer, torch.device("cpu"))
        assert next(loaded.pipe.transformer.parameters()).is_meta
        digests.append(
            weights_digest(loaded.pipe, lambda done, total, told=told: told.append((done, total)))
        )
        assert told == sorted(told) and told[-1][0] == told[-1][1] > 0
    assert digests[0] == digests[1] != digests[2]


def test_a_foreign_policy_counts_with_its_code(tmp_path, monkeypatch):
    """A peer with its library's version, a class of somebody's module with its file."""
    assert any(
        v.startswith("diffusers==")
        for v in parse_method("diffusers.first_block").spec["code"]["packages"]
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_scorer_module.py").write_text("class Mine:\n    size = 1\n")
    mine = importlib.import_module("my_scorer_module").Mine
    before = foreign_code([mine(), object(), 3])
    assert list(before) == ["my_scorer_module:Mine"]
    (tmp_path / "my_scorer_module.py").write_text("class Mine:\n    size = 2\n")
    assert foreign_code([mine()]) != before


@pytest.mark.usefixtures("calm")
def test_a_half_measured_result_does_not_replace_a_whole_one(loaded, tmp_path):
    """Two campaigns in one folder: the one that is stopped takes nothing from the other."""
    methods = ["steps=3", "steps=4"]
    whole = list(campaign(loaded, tmp_path, methods).run(silent))
    late = campaign(loaded, tmp_path, methods)
    case = late.cases()[0]
    late._keep(case, dataclasses.replace(whole[0], bracketed=False, seconds=99.0))
    assert late.results() == whole and all(r.bracketed for r in whole)
    scored = dataclasses.replace(whole[0], bracketed=False, caption=(1, 2), dense_caption=(1, 2))
    judge = campaign(loaded, tmp_path, methods, scorer=lambda pixels, prompt: (1, 2))
    judge._keep(case, dataclasses.replace(scored, scorer=judge._scorer_code))
    assert judge.stored(case).caption == (1, 2) and judge.stored(case).bracketed
