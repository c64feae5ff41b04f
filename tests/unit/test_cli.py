"""The command line as a user types it."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import flashomni
from flashomni.cli import app
from flashomni.lab import zoo

runner = CliRunner()


@pytest.fixture
def model(tmp_path):
    """A saved pipeline that generates in a moment."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    folder = tmp_path / "model"
    loaded.pipe.save_pretrained(folder)
    call = {**loaded.call, "height": 64, "width": 64, "num_inference_steps": 6}
    note = {"prompt": "a <b>ring</b>", "call": call}
    (folder / "flashomni.json").write_text(json.dumps(note))
    return folder


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_it_says_its_version():
    done = run("--version")
    assert done.exit_code == 0 and done.output.strip() == f"flashomni {flashomni.__version__}"


@pytest.mark.parametrize("recipe", ["balanced", "lossless", "fora"])
def test_generate_compare_writes_a_report(model, tmp_path, recipe):
    """Report, pictures and the keys that other programs read."""
    out = tmp_path / "out"
    done = run("generate", "--model", model, "--recipe", recipe, "--compare", "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    keys = {
        "model", "recipe", "seconds_dense", "seconds_accelerated", "speedup", "psnr_db", "ssim",
        "max_abs_diff", "flops_skipped", "cache_bytes", "steps",
    }  # fmt: skip
    assert keys <= set(report)
    assert len(report["steps"]) == 6 and report["recipe"]["name"] == recipe
    assert (out / "report.html").exists()
    if recipe == "lossless":
        assert report["max_abs_diff"] <= 1e-4


@pytest.mark.slow
def test_compare_prints_equal_time_and_keeps_rows(model, tmp_path):
    """Two tables and a CSV with a row for each."""
    csv = tmp_path / "rows.csv"
    done = run("compare", "fora:interval=2", "--model", model, "--rival", "steps=1", "--seed", 0,
               "--csv", csv, "--out", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "at equal time" in done.output and "best rival" in done.output
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "fora:interval=2" in page and page.count("data:image/webp") == 3
    assert [line.split(",")[1] for line in csv.read_text().splitlines()][1:] == [
        "fora:interval=2", "steps=1",
    ]  # fmt: skip


def test_generate_alone_writes_a_picture(model, tmp_path):
    """Without --compare: one picture and the summary."""
    done = run("generate", "a star", "--model", model, "--out", tmp_path / "out", "--steps", 3)
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "out").glob("accelerated.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--recipe", "ludicrous"), "recipe must be a preset"),
        (("generate", "--model", "nothing"), "model must be tiny-image"),
        (("generate", "--device", "abacus"), "device must be auto, cpu or cuda"),
        (("generate", "--dtype", "int3"), "dtype must be auto, float32"),
        (("generate", "--backend", "abacus"), "backend must be one of"),
        (("bench", "op", "sorting"), "op must be one of attention, attention_cached"),
        (("bench", "op", "--shape", "round"), "shape must be one of cpu-4096"),
        (("bench", "op", "--density", "0"), "density must be above 0"),
        (
            ("bench", "e2e", "--ulysses", 2, "--baseline", "eager", "--baseline", "cudnn"),
            "baseline must be one on several ranks, got eager, cudnn",
        ),
        (("tune", "--target-speedup", 2, "--computed", 4), "add --pareto"),
        (("show", "recipe", "ludicrous"), "recipe must be a preset"),
        (("show", "policies", "ludicrous"), "policy must be one of"),
        (("show", "backends", "ludicrous"), "op must be one of"),
        (("show", "models", "ludicrous"), "model must be one of"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message):
    """Exit code 2 and what is allowed; no traceback."""
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ") and "Traceback" not in done.output


@pytest.mark.parametrize("topic", ["recipe", "policies", "backends", "models"])
def test_show(topic):
    """Each topic prints a table."""
    done = run("show", topic)
    assert done.exit_code == 0, done.output
    expected = {
        "recipe": "taylorseer", "policies": "spargeattn", "backends": "gemm_o_update",
        "models": "FluxTransformer2DModel",
    }  # fmt: skip
    assert expected[topic] in done.output


def test_show_models_says_what_is_known_of_each():
    """Adapters, what the table declares, and everything else."""
    words = run("show", "models").output.split()
    for word in ("adapter", "declared", "generic"):
        assert word in words
    assert "text=last" in run("show", "models", "MochiTransformer3DModel").output


def test_show_recipe_prints_json():
    """What it prints can be saved and used as a recipe."""
    done = run("show", "recipe", "balanced")
    assert json.loads(done.output)["policy"]["name"] == "cached"


def test_doctor_names_versions_and_backends():
    """Versions, device, and every op with the backend that runs it."""
    done = run("doctor")
    assert done.exit_code == 0
    for word in ("torch", "diffusers", "gemm_q", "op by op"):
        assert word in done.output


def test_bench_appends_rows(tmp_path, monkeypatch):
    """A row a density and baseline, with versions and commit; appended to what is there; drawn."""
    from flashomni.lab.ops import problems as bench
    from flashomni.lab.ops.shapes import SHAPES, Shape

    monkeypatch.setitem(SHAPES, "cpu-4096", Shape(300, 2, 32))
    csv = tmp_path / "rows.csv"
    ops = sorted(bench.PROBLEMS)
    for op in ops:
        done = run(
            "bench", "op", op, "--device", "cpu", "--density", 0.5, "--rounds", 1, "--csv", csv
        )
        assert done.exit_code == 0, done.output
    lines = csv.read_text().splitlines()
    columns = (
        "op,shape,seqlen,density,backend,ms,baseline,baseline_ms,ratio,ideal,gpu,torch,triton,"
    )
    assert lines[0] == columns + "commit,command"
    assert [line.split(",")[0] for line in lines[1:]] == ops
    plot = tmp_path / "plots" / "rows.png"
    again = ("bench", "op", "gemm_q", "--device", "cpu", "--density", 0.5, "--rounds", 1)
    assert run(*again, "--csv", csv, "--plot", plot).exit_code == 0 and plot.stat().st_size > 0
    csv.write_text("other,columns\n1,2\n")
    done = run(*again, "--csv", csv)
    assert done.exit_code == 2 and "has other columns" in done.output
    assert csv.read_text() == "other,columns\n1,2\n"
    done = run(*again, "--plot", plot)
    assert done.exit_code == 2 and "plot needs csv" in done.output


def test_bench_kernels_keeps_rows_and_says_what_is_missing(tmp_path, monkeypatch):
    """Against targets, problem by problem; one that fails, or has no time left, costs its own."""
    from flashomni.lab.ops import figures
    from flashomni.lab.ops import problems as bench
    from flashomni.lab.ops.shapes import SHAPES, Shape

    monkeypatch.setitem(SHAPES, "cpu-4096", Shape(300, 2, 32))
    chosen = (
        figures.Figure("gemm_q", "cpu-4096", 0.5, "torch linear", 1e-9),
        figures.Figure("attention", "cpu-4096", 0.5, "torch sdpa", 1e9, per_work=True),
        figures.Figure("attention", "cpu-4096", 0.5, "FA4", 1.0),
        figures.Figure("gemm_o", "cpu-4096", 0.5, "torch linear", 1.0),
    )
    monkeypatch.setattr(figures, "FIGURES", chosen)

    def broken(request):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(bench.PROBLEMS, "gemm_o", broken)
    csv = tmp_path / "rows.csv"
    asked = ("bench", "kernels", "--device", "cpu", "--rounds", 1, "--csv", csv)
    done = run(*asked)
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "0.000 met" in words and "1000000000.000 missed" in words
    assert "torch sdpa x density" in words
    assert "gemm_o cpu-4096 0.5 not measured: RuntimeError: no such instruction" in words
    assert [line.split(",")[0] for line in csv.read_text().splitlines()] == [
        "op", "gemm_q", "attention",
    ]  # fmt: skip
    done = run(*asked, "--part", "gemm", "--seconds", -1)
    words = " ".join(done.output.split())
    assert "gemm_q cpu-4096 0.5 not measured: -1 s are over" in words
    assert "attention cpu-4096" not in words
    assert run("bench", "kernels", "--part", "all").exit_code == 2


def test_a_baseline_that_is_wrong_is_missing():
    """Its reason is told; the rest is timed."""
    from flashomni.lab.ops import table
    from flashomni.lab.ops.problem import Baseline, Problem

    def fails():
        raise OSError("no compiler")

    found = {
        "right": Baseline(print, 1.0, lambda: 1e-3),
        "wrong": Baseline(print, 1.0, lambda: 0.5),
        "broken": Baseline(print, 1.0, fails),
    }
    problem = Problem("cpu", 1.0, print, 1, found)
    table._check(problem, torch.bfloat16)
    assert list(problem.baselines) == ["right"]
    assert problem.missing["wrong"] == "relative error 5.00e-01 is above 1e-02"
    assert problem.missing["broken"] == "OSError: no compiler"


def test_bench_reports_nothing_for_a_wrong_result(monkeypatch):
    """Correctness first: a backend that is wrong is not timed."""
    from flashomni.lab.ops import problems as bench
    from flashomni.lab.ops.shapes import SHAPES, Shape

    monkeypatch.setitem(SHAPES, "cpu-4096", Shape(300, 2, 32))
    problem = bench.PROBLEMS["attention"]

    def broken(request):
        return dataclasses.replace(problem(request), check=lambda: 0.5)

    monkeypatch.setitem(bench.PROBLEMS, "attention", broken)
    done = run("bench", "op", "attention", "--device", "cpu", "--density", 0.5)
    assert done.exit_code == 1 and "nothing is timed" in done.output


@pytest.mark.parametrize("recipe", ["[/red]", "[bold]x", "\x1b[31m"])
def test_words_are_not_markup(recipe):
    """What was typed is shown, also in an error."""
    done = run("generate", "--recipe", recipe)
    assert done.exit_code == 2 and "\x1b" not in done.output
    assert recipe.replace("\x1b", "\\x1b") in done.output.replace("\\\\", "\\").replace("\n", "")


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_out_is_tried_before_anything_is_loaded(tmp_path, command):
    """A file in the place of the folder is found at once."""
    (tmp_path / "out").write_text("mine")
    done = run(command, "--model", "nothing", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "out must be a folder that can be written" in done.output
    assert (tmp_path / "out").read_text() == "mine"


def test_a_report_that_fails_loses_no_picture(model, tmp_path, monkeypatch):
    """The pictures land somewhere, and the message says where."""
    from flashomni.lab import viz

    def fail(*_):
        raise ValueError("no [/red] ink")

    monkeypatch.setattr(viz, "step_times", fail)
    out = tmp_path / "out"
    done = run("generate", "[/bold] :star:", "--model", model, "--compare", "--out", out)
    assert done.exit_code == 1 and "no [/red] ink" in done.output
    assert "[/bold] :star:" in done.output and str(out) in done.output.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {"dense.png", "accelerated.png"}


def test_pictures_that_are_not_finite_are_saved_and_named(model, tmp_path, monkeypatch):
    """Black where nothing is known, and an exit code that scripts see."""
    from flashomni.lab import generation

    frames = generation.frames
    monkeypatch.setattr(generation, "frames", lambda output: frames(output) * float("nan"))
    done = run("generate", "--model", model, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "not finite" in done.output
    assert (tmp_path / "out" / "accelerated.png").exists()


def spoil(monkeypatch, size=None):
    """Results that are not finite, or that are smaller than SSIM's window."""
    from flashomni.lab import generation

    frames = generation.frames

    def spoiled(output):
        pixels = frames(output)
        return pixels * float("nan") if size is None else pixels[..., :size, :size].contiguous()

    monkeypatch.setattr(generation, "frames", spoiled)


@pytest.mark.parametrize(("size", "code"), [(None, 1), (8, 0)])
def test_a_comparison_that_cannot_be_made_is_still_reported(
    model, tmp_path, monkeypatch, size, code
):
    """The report says first why something is not known."""
    spoil(monkeypatch, size)
    out = tmp_path / "out"
    done = run("generate", "--model", model, "--compare", "--out", out)
    assert done.exit_code == code and done.output.index("note: ") < done.output.index("speed-up")
    report = json.loads((out / "report.json").read_text())
    unknown = report["psnr_db"] is None and not report["identical"]
    assert report["ssim"] is None and unknown == (size is None)
    assert ("not finite" if size is None else "11 x 11") in report["notes"][0]
    page = (out / "report.html").read_text()
    assert page.index("<h2>Notes</h2>") < page.index('class="fo-speed"')


@pytest.mark.slow
@pytest.mark.parametrize("compiles", [True, False])
def test_kernels_compile_before_anything_is_timed(model, tmp_path, monkeypatch, compiles):
    """Both sides run shortly, with every kind of step; the time is said and not counted."""
    from flashomni.lab import generation

    monkeypatch.setattr(generation.Generation, "compiles", property(lambda self: compiles))
    out = tmp_path / "out"
    done = run("generate", "--model", model, "--compare", "--out", out)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert (report["seconds_warm_up"] > 0) == compiles == ("warm-up: " in done.output)
    assert len(report["steps"]) == 6
