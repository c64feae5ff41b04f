"""The compatibility matrix: its page says what its rows and the code say; its checks can fail."""

import json
import multiprocessing
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from matrix import definition, jobs, models, page, small

from flashomni.engine.recipe import methods, presets

DATA = json.loads(page.DATA.read_text(encoding="utf-8"))
MODELS, PIPELINES = page.parts(DATA["rows"])
CLASSES = set(DATA["classes"])
STATUS = ("works", "refused", "wrong", "miscounted", "not built", "not run")


def test_the_page_is_that_of_the_rows():
    """Nobody edits it by hand, and its counts are theirs."""
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


@pytest.mark.slow
def test_every_class_has_a_row_with_the_tier_that_the_code_gives():
    """A class that gets an adapter, or a line in the table, is measured again."""
    tiers = {name: page.tier_of(cls) for name, cls in small.classes().items()}
    assert tiers == DATA["classes"]
    for row in page.works(MODELS):
        variant = any(note.startswith("without the adapter") for note in row["uncached"])
        assert row["tier"] == tiers[row["name"]] or (variant and row["tier"] == "declared"), row
    text = page.PAGE.read_text(encoding="utf-8")
    for name in CLASSES:
        assert f"| {name} | {tiers[name]}" in text, name


def test_what_works_is_exact_and_guarded():
    """No row says that it works without having shown it."""
    assert len({row["name"] for row in page.works(MODELS)}) >= 64
    for row in page.works(MODELS):
        assert row["removed"] and row["lossless"]["error"] < 1e-5, row
        defined = row.get("definition", "")
        assert isinstance(defined, str) or defined["error"] < 1e-5, row
        cached = {key: row[key]["error"] for key in page.CACHED if "error" in row[key]}
        coarse = {models.TILES: models.COARSE} if "rounds" in row else {}
        assert cached, row
        assert all(error < coarse.get(key, 1e-5) for key, error in cached.items()), row
        for guard in (row["guard"], row.get("tile guard", "")):
            assert isinstance(guard, str) or guard > 1, row
        assert any("computed in every step" in note for note in row["uncached"]) >= isinstance(
            row["guard"], str
        ), row
    equal = {row["name"] for row in page.works(MODELS) if page.is_defined(row)}
    assert len(equal) >= 64
    for row in page.works(PIPELINES):
        assert row["removed"] and row["lossless"] < 1e-5 and row["steps"] > 0, row


def test_what_does_not_work_says_why():
    """Refused, not built, not run: each with words."""
    for row in [*MODELS, *PIPELINES]:
        assert row["status"] in STATUS
        assert bool(row["why"]) == (row["status"] != "works"), row


def test_a_class_is_checked():
    """A small model of the repository, from end to end."""
    row = models.check(lambda: small.build("DiTTransformer2DModel"))
    assert (row["status"], row["tier"], row["why"]) == ("works", "generic", "")
    assert row["ours"] == sum(row["blocks"].values()) == 3 and row["removed"]
    assert row["guard"] > 1 and row["tile guard"] > 1
    assert row["fora"]["kinds"] == ["bypass", "full", "update"]
    assert sum(row["kernels"].values()) >= 3


@torch.no_grad()
def test_the_definition_sees_another_forecast():
    """A line through what blocks added is not what they last added."""
    model, inputs = small.build("DiTTransformer2DModel")
    run = models._Run(
        model, inputs, models.output(model, inputs), {"device": "cpu", "dtype": "float32"}
    )
    run.definition(models.recipes()["fora"])
    assert run.row["definition"]["error"] < 1e-5 and run.wrong == []
    run.definition(models.recipes()["fora"].replace(layer_order=1))
    assert "from their definition" in run.wrong[0] and run.row["definition"]["error"] > 1e-4
    assert not any("forward" in vars(block) for block in model.transformer_blocks)


@torch.no_grad()
def test_a_definition_that_shows_nothing_is_none():
    """Inputs that stay the same; blocks that hand nothing on: said, never taken for equal."""
    model, inputs = small.build("DiTTransformer2DModel")
    steps = [inputs] * 3
    got = [models.output(model, inputs)] * 3
    arguments = (model, steps, ["transformer_blocks"], [False, False, True], got, models.output)
    with pytest.raises(LookupError, match="nothing shows"):
        definition.error(*arguments)
    model, inputs = small.build("HiDreamImageTransformer2DModel")
    with pytest.raises(LookupError, match="double_stream_blocks: nothing is handed"):
        definition.Definition(model, inputs, ["double_stream_blocks"], models.output)
    assert not any("forward" in vars(block) for block in model.double_stream_blocks)


def test_the_check_sees_what_is_wrong(monkeypatch):
    """Values that are off while layers are cached, and a guard that sees nothing."""
    run = models._Run.constant

    def constant(self, name, recipe):
        found = models.output
        monkeypatch.setattr(models, "output", lambda *given: found(*given) + 1e-3)
        run(self, name, recipe)
        monkeypatch.setattr(models, "output", found)

    monkeypatch.setattr(models._Run, "constant", constant)
    monkeypatch.setattr(models, "shift_layers", lambda engine: 1)
    row = models.check(lambda: small.build("DiTTransformer2DModel"))
    assert row["status"] == "wrong"
    for words in ("fora is off by", "balanced is off by", "guard: a cached value off by 1e-3"):
        assert words in row["why"]


@pytest.mark.slow
def test_a_model_that_attends_in_bfloat16_is_exact_to_that():
    """Its tiles are held to half a step of it, its layers to as much as those of the others."""
    row = models.check(lambda: small.of_more(small.MORE["SanaWMTransformer3DModel"]))
    assert (row["status"], row["why"]) == ("works", "") and "bfloat16" in row["rounds"]
    assert 1e-5 < row[models.TILES]["error"] < models.COARSE and row["fora"]["error"] < 1e-5
    assert row["guard"] > 1 and row["tile guard"] == row["rounds"]
    assert row["rounds"] in page.reasons([row])


def test_a_model_that_is_refused_says_why():
    """No list of blocks: not a failure of the check."""

    class Bare(torch.nn.Module):
        def forward(self, hidden_states, return_dict=False):
            return (hidden_states,)

    row = models.check(lambda: (Bare(), {"hidden_states": torch.ones(2, 3)}))
    assert row["status"] == "refused" and "no ModuleList of blocks" in row["why"]


@pytest.mark.slow
def test_cases_run_alone_and_once(tmp_path):
    """One that dies, hangs or raises has a row as well; what has a row is not run again."""
    ran = []

    def raises():
        raise ImportError("no module\n of that name")

    cases = {
        "models/A/dies": jobs.Case(lambda: os._exit(3)),
        "models/B/hangs": jobs.Case(lambda: threading.Event().wait()),
        "models/C/raises": jobs.Case(raises),
        "models/D/works": jobs.Case(lambda: {"status": "works"}, lambda: ran.append("warm")),
    }
    rows = dict(row for row in jobs.run_all(cases, tmp_path, timeout=2))
    assert [row["status"] for row in rows.values()] == ["not run", "not run", "not built", "works"]
    assert rows[1]["why"] == "its process ended with 3" and "more than 2 s" in rows[2]["why"]
    assert rows[3]["why"] == "ImportError: no module of that name"
    assert [row["case"] for row in jobs.read_all(tmp_path)] == list(cases)
    assert list(jobs.run_all(cases, tmp_path, timeout=2)) == [] and ran == ["warm"]


@pytest.mark.slow
def test_cases_run_side_by_side(tmp_path):
    """As many at once as asked for, no more; a later one may end first; what hangs ends alone."""
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def meets():
        barrier.wait(20)
        return {"status": "works"}

    cases = {f"models/A/{n}": jobs.Case(meets) for n in range(4)}
    cases["models/B/hangs"] = jobs.Case(lambda: threading.Event().wait())
    rows = dict(jobs.run_all(cases, tmp_path, timeout=3, at_once=2))
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert [rows[n]["status"] for n in range(1, 5)] == ["works"] * 4
    assert "more than 3 s" in rows[5]["why"]


def test_the_rows_of_a_card_are_a_column(tmp_path, monkeypatch):
    """Counted where a kernel ran, not the reference; what is wrong there is said."""
    for name in ("CARD", "PAGE"):
        monkeypatch.setattr(page, name, tmp_path / name)
    assert "card" not in page.page().split("## Transformer classes")[1].split("|")[:12]
    kept = {
        name: page.works(rows)[0] for name, rows in page.by_name(MODELS).items() if page.works(rows)
    }
    names = sorted(kept)[:4]
    rows = [{**kept[name], "kernels": {"sm90": 9}, "on": "a card"} for name in names]
    rows[1]["kernels"] = {"portable": 3, "reference": 1}
    rows[2] |= {"status": "wrong", "why": "fora is off by 3.0e-01 of the output's size"}
    rows[3] = {"case": rows[3]["case"], "status": "not built", "why": "RuntimeError: no"}
    page.write_rows(tmp_path / "rows.json", rows, "cuda")
    page.keep_card(tmp_path / "rows.json")
    text = (tmp_path / "PAGE").read_text("utf-8")
    assert page.card()[0].startswith("a card, diffusers ")
    tiers = Counter(kept[name]["tier"] for name in names[:2])
    shares = ", ".join(f"{tiers[tier]} {tier}" for tier in page.ORDER)
    assert f"4 classes ran, 2 work ({shares}), 1 with their largest self-attention on" in text
    assert f"Wrong: {names[2]}." in text and "| attention | card | errors |" in text
    lines = {
        name: next(x for x in text.splitlines() if x.startswith(f"| {name} |")) for name in names
    }
    shown = [line.split(" | ")[4] for line in lines.values()]
    count = sum(rows[0]["blocks"].values())
    assert shown[0] == f"{rows[0]['ours']} of {count}, sm90" and shown[1].startswith("0 of ")
    assert shown[2] == "**fora is off by 3.0e-01 of the output's size**"
    assert shown[3] == "not built: RuntimeError: no"
    starts = ("| class", *(f"| {name} |" for name in names))
    columns = {line.count(" | ") for line in text.splitlines() if line.startswith(starts)}
    assert len(columns) == 1


PIPELINE = """
import torch
from diffusers import FluxPipeline
from flashomni.lab import zoo


class Tests:
    pipeline_class = FluxPipeline

    def get_dummy_components(self):
        made = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
        return dict(made.pipe.components, transformer=made.pipe.transformer)

    def get_dummy_inputs(self):
        return {
            "prompt": "a red circle", "height": 32, "width": 32, "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(0), "output_type": "pt",
        }
"""


@pytest.mark.slow
def test_a_pipeline_is_checked(tmp_path):
    """Found by reading, built and run as diffusers' own tests are."""
    from matrix import pipelines

    folder = tmp_path / "tests" / "pipelines"
    folder.mkdir(parents=True)
    (folder / "test_tiny_flux.py").write_text(PIPELINE.replace("tests.", ""))
    ((name, test),) = pipelines.cases(tmp_path)
    assert name == "FluxPipeline/Tests"
    _, module, cls = test
    case = jobs.Case(lambda: pipelines.check((folder, module.rpartition(".")[2], cls)))
    ((_, row),) = jobs.run_all({f"pipelines/{name}": case}, tmp_path / "out", timeout=120)
    assert (row["status"], row["tier"], row["lora"]) == ("works", "adapter", "exact"), row
    assert row["steps"] == pipelines.STEPS and row["ours"] == row["blocks"] == 2
    assert "bypass" in row["fora"]["kinds"]


def test_readme_has_the_rows_of_registries_and_matrix():
    """What it says of support is counted, not written: `tools/compatibility.py --readme`."""
    rows = page.support()
    assert f"of the {len(CLASSES)} transformer classes" in rows[0] and "`Flux`" in rows[0]
    assert all(f"`{name}`" in rows[1] for name in presets()) and f" {len(methods())} [" in rows[1]
    readme = Path(__file__).resolve().parents[2] / "README.md"
    table = readme.read_text("utf-8").partition("## What works with what")[2].partition("\n## ")[0]
    assert table.splitlines()[4:7] == rows


@pytest.mark.parametrize("visible", [None, "2", "1,0"])
def test_only_cases_see_the_cards(monkeypatch, tmp_path, visible):
    """What a parent imports must not touch CUDA: its forks could not use it."""
    monkeypatch.delenv(jobs.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(jobs.VISIBLE, visible)
    for name in (jobs.HIDDEN, "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")  # so that they are gone afterwards
    jobs.hide_cards()
    jobs.hide_cards()  # before anything is imported, and where the device is known
    assert os.environ[jobs.VISIBLE] == ""
    seen = jobs.Case(lambda: {"visible": os.environ.get(jobs.VISIBLE)})
    [(_, row)] = jobs.run_all({"models/A/a": seen}, tmp_path, timeout=20)
    assert row["visible"] == visible


class KeepsTime(torch.nn.Module):
    """As Kandinsky's: what makes the time's embedding is loaded in fp32, whatever the rest is."""

    _keep_in_fp32_modules = ("time",)

    def __init__(self):
        super().__init__()
        self.time, self.out = torch.nn.Linear(1, 8), torch.nn.Linear(8, 8)

    def forward(self, x, t):
        return (self.out(x + self.time(t.float()).to(x.dtype)),)


def test_what_diffusers_loads_in_fp32_stays_so_where_it_must():
    """A model that cannot be lowered whole is lowered as its own loader does it."""
    inputs = {"x": torch.randn(1, 3, 8), "t": torch.ones(1, 1)}
    model, given = models.lowered(KeepsTime(), inputs, "cpu", torch.bfloat16)
    assert model.time.weight.dtype == torch.float32 and model.out.weight.dtype == torch.bfloat16
    assert given["x"].dtype == torch.bfloat16 and given["t"].dtype == torch.float32


def test_the_page_of_models_says_what_a_card_found():
    """Its figures are those of the rows; nothing there is wrong, and what is kept says so."""
    _, named = page.card()
    right = {name for name, rows in named.items() if page.works(rows)}
    ours = sum(any(page.by_kernels(row) for row in page.works(named[name])) for name in right)
    own = sum(page.works(named[name])[0]["tier"] == "adapter" for name in right)
    text = " ".join((page.ROOT / "docs" / "models.md").read_text("utf-8").split())
    assert right == set(named) == set(CLASSES)
    assert (
        f"all {len(right)} classes work in fp32 on a CPU and in bf16 on an H200, where {ours} "
        in text
    )
    assert f"The {own} adapters are among them" in text and ours >= 45
