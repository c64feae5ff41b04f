"""Studies and the caption scorer: points have a meaning, the grammar reads its own sentences."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

from flashomni.lab import split, zoo
from flashomni.lab.fidelity import Campaign, parse_method

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(p.stem for p in (ROOT / "studies").glob("[a-z]*.py"))
assert STUDIES, "no studies found: has a folder moved?"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    monkeypatch.syspath_prepend(str(ROOT))


def study(name):
    sys.modules.pop(name, None)
    return importlib.import_module(name).STUDY


@pytest.mark.parametrize("name", STUDIES)
def test_every_point_has_a_meaning(name):
    """File and study share the name; methods parse; no point is measured twice for one line."""
    found = study(name)
    assert found.name == name
    for point in found.points:
        parse_method(point.method)
    places = [(p.series, p.method, p.model, str(p.call)) for p in found.points]
    assert len(set(places)) == len(places)


@pytest.mark.slow
def test_a_study_writes_its_page(monkeypatch, tmp_path):
    """Run, table, plot and page, on a pipeline of random weights."""
    import _study

    def small(name, device, dtype):
        loaded = zoo.random_pipeline(name, heads=2, head_dim=32, dual=1, single=1)
        size = {"height": 64, "width": 64, "num_inference_steps": 6}
        prompts = zoo.read_note(zoo.bundled(name))["prompts"]
        return dataclasses.replace(loaded, call={**loaded.call, **size}, prompts=prompts)

    asked = []

    def campaign(model, loaded, methods, prompts, *rest):
        asked.extend(prompts)
        return Campaign(model, loaded, methods, prompts, *rest)

    monkeypatch.setattr(_study.zoo, "load", small)
    monkeypatch.setattr(_study, "Campaign", campaign)
    whole = study("granularity")
    keep = [p for p in whole.points if p.model == "tiny-image" and p.series.startswith("whole")]
    some = dataclasses.replace(whole, points=keep[:2])
    measured = _study.run(some, "cpu", 1, 1, None, tmp_path / "work")
    assert asked == zoo.read_note(zoo.bundled("tiny-image"))["prompts"][16:17]
    _study.write(some, measured, tmp_path / "docs", "python studies/granularity.py")
    page = (tmp_path / "docs" / "granularity.md").read_text()
    assert "python studies/granularity.py" in page and "| tiny-image | whole layers" in page
    assert {p.suffix for p in (tmp_path / "docs").iterdir()} == {".md", ".png", ".csv"}


@pytest.mark.parametrize("model", zoo.BUNDLED)
def test_the_split_of_the_bundled_prompts(model):
    """Chosen on 0 to 15, reported on 16 to 39, the rest kept aside; no prompt is in two places."""
    prompts = zoo.read_note(zoo.bundled(model))["prompts"]
    assert len(set(prompts)) == len(prompts) >= 48
    assert split.pick(model, prompts, "tune") == prompts[:16]
    assert split.pick(model, prompts) == split.pick(model, prompts, "report") == prompts[16:40]
    assert split.pick(model, prompts, "tune", 3) == prompts[:3]


def test_a_split_that_cannot_be_is_refused():
    """Neither an unknown part nor a list that is too short gives prompts of another part."""
    with pytest.raises(ValueError, match="split must be one of tune, report, got 'aside'"):
        split.pick("tiny-image", ["a"] * 64, "aside")
    with pytest.raises(ValueError, match="at least 40"):
        split.pick("tiny-image", ["a"] * 20)
    assert split.pick("some/folder", ["a", "b"], "tune") == ["a", "b"]


@pytest.mark.parametrize("video", [False, True])
def test_the_grammar_reads_its_own_sentences(video):
    """What a caption says about objects, places and motion survives the round trip."""
    from training import agreement, scenes

    batch = scenes.sample(100, torch.Generator().manual_seed(3), video, "heldout")
    for i, caption in enumerate(scenes.captions(batch)):
        read, count = agreement.parse(caption), int(batch.count[i])
        assert int(read.count) == count and read.video is video
        assert read.layouts()[int(read.layout)].slots == batch.layouts()[int(batch.layout[i])].slots
        for name in ("colour", "shape", "motion"):
            assert (
                getattr(read, name)[0, :count].tolist() == getattr(batch, name)[i, :count].tolist()
            )
    with pytest.raises(ValueError, match="caption must come from the grammar"):
        agreement.parse("a cat on a mat")


def test_the_scorer_agrees_with_rendered_truth_only():
    """Rendered scenes bear out their own captions and hardly those of others."""
    from training import agreement, scenes, score

    batch = score.heldout_scenes(4, False, 5)
    captions = scenes.captions(batch)
    pictures = torch.from_numpy(score.truth(batch, 192, 1)).permute(0, 3, 1, 2)[:, None] / 255
    own = [agreement.agreement(p, c) for p, c in zip(pictures, captions, strict=True)]
    assert sum(right for right, _ in own) == sum(count for _, count in own)
    other = [agreement.agreement(p, c) for p, c in zip(pictures, captions[1:], strict=False)]
    assert sum(right for right, _ in other) < 0.5 * sum(count for _, count in other)
