"""``flashomni.tune`` and the command, end to end on a toy pipeline."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flashomni
from flashomni.cli import app
from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.models import accelerate
from flashomni.tuning import NotBetterError, Settings, tune
from flashomni.tuning import run as running
from flashomni.tuning.cost import Costs
from flashomni.tuning.drive import Driver
from flashomni.tuning.gains import direct_effects, gain
from flashomni.tuning.polish import Candidate, simulate
from flashomni.tuning.record import gram, needed_bytes, record
from flashomni.tuning.state import State
from flashomni.tuning.validate import Verdict, ramp_steps, recipe_of

PROMPTS = ["a red circle", "a blue square", "a green ring"]
FEW = Settings(tries=1, probes=2, probed=1, sparse=0, groups=0)
STEPS = 8


@pytest.fixture(scope="module")
def loaded():
    """A pipeline that generates in a moment; its random weights do amplify errors."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    loaded.call.update(height=64, width=64, num_inference_steps=STEPS)
    return loaded


@pytest.fixture(scope="module")
def driver(loaded):
    return Driver(loaded.pipe, loaded.call)


@pytest.fixture(scope="module")
def recording(driver):
    return record(driver, PROMPTS[0], 0)


def test_recording_is_the_stock_run(loaded, driver, recording):
    """Replayed, it gives the latents of the pipeline, bit by bit, and computes nothing."""
    stock = loaded.pipe(
        PROMPTS[0], **loaded.call, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    assert torch.equal(recording.latents, stock.float().flatten())
    before = driver.computed
    again = driver.run(PROMPTS[0], 0, lambda step, call, compute: recording.outputs[step][call])
    assert torch.equal(again, recording.latents) and driver.computed == before
    assert "forward" not in loaded.pipe.transformer.__dict__


def test_the_presets_forecast_is_what_planning_predicts(loaded, driver, recording):
    """With the noise of the pipeline: replayed as planned, it is what the engine generates."""
    assert driver.sigmas == tuple(loaded.pipe.scheduler.sigmas.tolist())
    steps = (0, 1, 3, 6)
    costs = Costs(np.eye(STEPS)[None], np.ones(STEPS), np.ones((2, STEPS)), driver.sigmas)
    weights = costs.only(0).forecasts(steps, 2, "quadrature")
    assert not np.allclose(weights, costs.forecasts(steps, 2, "hermite"))
    planned = simulate(driver, recording, Candidate(steps, weights, 2, "quadrature", "", 0.0))
    with accelerate(loaded.pipe, recipe_of(steps, STEPS)):
        torch.testing.assert_close(driver.generate(PROMPTS[0], 0), planned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [{}, {"true_cfg_scale": 4.0, "negative_prompt": "dark"}])
def test_memory_is_said_before(loaded, guidance):
    """Of the first step: the bytes that all outputs then have, of every call of a step."""
    driver = Driver(loaded.pipe, {**loaded.call, **guidance})
    outline = driver.outline(PROMPTS[0])
    assert driver.computed == outline.calls == (2 if guidance else 1)
    found = record(driver, PROMPTS[0], 0)
    assert outline.num_steps == found.num_steps == STEPS
    assert needed_bytes(outline) == sum(x.nbytes for step in found.outputs for x in step)


def test_recordings_come_back(recording, tmp_path):
    """From their file, whole; one that was cut is none."""
    state = State(tmp_path, {"a": 1})
    assert state.recording(0) is None
    state.keep(0, recording, 1.0)
    back = State(tmp_path, {"a": 1}).recording(0)
    assert back is not None and (back.prompt, back.seed) == (recording.prompt, recording.seed)
    assert torch.equal(back.latents, recording.latents)
    for ours, theirs in zip(recording.outputs, back.outputs, strict=True):
        assert torch.equal(ours[0], theirs[0])
    path = tmp_path / "dense-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert State(tmp_path, {"a": 1}).recording(0) is None
    assert State(tmp_path, {"a": 2}).foreign


def test_direct_effects_are_the_scheduler_s(loaded, driver, recording):
    """Of flow matching: the change of sigma. Nothing is computed."""
    before = driver.computed
    found = direct_effects(driver, recording)
    assert driver.computed == before
    sigmas = loaded.pipe.scheduler.sigmas
    wanted = (sigmas[:-1] - sigmas[1:]).numpy()
    assert found.shape == (STEPS, 1)
    assert found[:, 0] == pytest.approx(wanted, rel=1e-3)


def test_gain_of_the_last_step_is_one(driver, recording):
    """Behind it the network computes nothing; before it, something."""
    last, first = gain(driver, recording, STEPS - 1), gain(driver, recording, 1)
    assert last.along == pytest.approx(1.0, rel=1e-4) and last.across < 1e-3
    assert first.across > 0.01


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_tried_is_what_the_engine_does(loaded, driver, recording, order):
    """A candidate on the real output, and its recipe on the accelerated pipeline."""
    effects = direct_effects(driver, recording)
    products = gram(recording, effects, torch.device("cpu"))
    found = Costs(products[None], effects.sum(1), np.stack([np.ones(STEPS), np.zeros(STEPS)]))
    steps = (0, 1, 3, 6)
    weights = found.fit(steps, order, 1e-2)
    candidate = Candidate(steps, weights, order, "fitted", "", 0.0)
    tried = simulate(driver, recording, candidate)
    with accelerate(loaded.pipe, recipe_of(steps, STEPS, candidate)):
        ours = loaded.pipe(
            PROMPTS[0], **loaded.call, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images.flatten()  # fmt: skip
    assert (tried - recording.latents).norm() > 1e-3 * recording.latents.norm()
    torch.testing.assert_close(ours, tried, rtol=1e-3, atol=1e-3)


def test_guidance_by_two_calls_is_combined_as_the_pipeline_does():
    """Two calls a step: effects have the signs of guidance, 1 - scale for the second."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    call = {**loaded.call, "height": 64, "width": 64, "num_inference_steps": 3}
    call |= {"true_cfg_scale": 4.0, "negative_prompt": "dark"}
    driver = Driver(loaded.pipe, call)
    recording = record(driver, PROMPTS[0], 0)
    assert recording.rows == 2
    found = direct_effects(driver, recording)
    assert found[:, 1] / found[:, 0] == pytest.approx([-0.75] * 3, rel=1e-2)


@pytest.mark.slow
def test_tune_writes_a_recipe_that_remembers(loaded, tmp_path, caplog):
    """It beats the ramp, runs as it was validated, and warns elsewhere; a run may be resumed."""
    out = tmp_path / "mine.json"
    said = []
    seen = []
    found = flashomni.tune(
        loaded.pipe, PROMPTS, call=loaded.call, target_speedup=1.4, out=out, settings=FEW,
        on_progress=lambda stage, done, total: seen.append((stage, done, total)),
        on_note=said.append,
    )  # fmt: skip
    assert "KiB a prompt" in said[0]
    recipe = Recipe.load(out)
    assert recipe == found.recipe and recipe.tuned.num_steps == STEPS
    assert recipe.tuned.ramp == f"ramp:computed={found.chosen.computed},of={STEPS}"
    assert found.chosen.verdict.gain_db > 0
    assert all(done <= total for _, done, total in seen)
    assert {"recording", "gains", "held back"} <= {stage for stage, _, _ in seen}
    report = json.loads((tmp_path / "mine.tune" / "report.json").read_text())
    assert report["points"][0]["psnr_db"] == found.chosen.verdict.psnr_db
    assert not list((tmp_path / "mine.tune").glob("dense-*"))

    caplog.set_level(logging.WARNING, "flashomni")
    with accelerate(loaded.pipe, recipe):
        loaded.pipe(PROMPTS[0], **loaded.call, output_type="latent")
        assert not caplog.records
        for _ in range(2):
            loaded.pipe(PROMPTS[0], **{**loaded.call, "num_inference_steps": 5, "height": 32})
    text = [record.getMessage() for record in caplog.records]
    assert len(text) == 2 and "8 steps, these are 5" in text[0] and "latents" in text[1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on(loaded, tmp_path):
    """What was found is not computed again; the result is the same."""
    out = tmp_path / "mine.json"
    options = {"call": loaded.call, "pareto": [4], "settings": FEW, "held_back": 1}
    whole = tune(loaded.pipe, PROMPTS, out=tmp_path / "whole.json", **options)

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        counts.append(done)
        if stage == "4 of 8":
            raise Stop

    counts = []
    with pytest.raises(Stop):
        tune(loaded.pipe, PROMPTS, out=out, on_progress=stop, **options)
    assert not out.exists() and "forward" not in loaded.pipe.transformer.__dict__
    before, counts = counts[-1], []
    stopped = json.loads((tmp_path / "mine.tune" / "state.json").read_text())["found"]["seconds"]
    stages = []
    again = tune(
        loaded.pipe, PROMPTS, out=out,
        on_progress=lambda stage, done, total: (stages.append(stage), counts.append(done)),
        **options,
    )  # fmt: skip
    assert again.resumed > 0 and before > 2 * STEPS
    assert again.seconds > stopped > 0  # of both runs
    assert "recording" not in stages and "gains" not in stages
    assert again.recipe.to_dict()["schedule"] == whole.recipe.to_dict()["schedule"]
    assert again.chosen.measured_db == pytest.approx(whole.chosen.measured_db, abs=1e-3)
    counts.clear()  # a run that was finished has its findings: nothing is recorded again
    once_more = tune(
        loaded.pipe, PROMPTS, out=out, on_progress=lambda *told: counts.append(told), **options
    )
    assert once_more.recipe == again.recipe and not counts


@pytest.mark.slow
def test_no_recipe_where_the_ramp_is_not_beaten(loaded, tmp_path, monkeypatch):
    """The error names the ramp and both figures, and nothing is written."""
    lost = Verdict(30.0, 29.0, 31.0, 30.0, -1.0, 0.2, None, None, None, 2.0)
    monkeypatch.setattr(Verdict, "of", classmethod(lambda cls, *_: lost))
    out = tmp_path / "mine.json"
    with pytest.raises(NotBetterError, match=r"ramp:computed=4,of=8.*31.0 dB") as caught:
        tune(loaded.pipe, PROMPTS, call=loaded.call, pareto=[4], out=out, settings=FEW)
    assert not list(tmp_path.glob("mine*.json")) and caught.value.found.points[0].computed == 4


@pytest.mark.slow
def test_a_schedule_that_the_fitted_ramp_beats_is_not_written(loaded, tmp_path, monkeypatch):
    """The ramp with weights fitted in the same way is, where it beats the presets' forecast."""
    of = Verdict.of

    def worse(cls, tuned, ramp, same):
        found = of(tuned, ramp, same)
        return found if same is None else replace(found, schedule_gain_db=-0.1)

    monkeypatch.setattr(Verdict, "of", classmethod(worse))
    options = {"call": loaded.call, "pareto": [4], "settings": FEW}
    found = tune(loaded.pipe, PROMPTS, out=tmp_path / "mine.json", **options)
    assert found.recipe.schedule.steps == ramp_steps(4, STEPS)
    assert found.recipe.forecast.name == "fitted" and found.chosen.source.startswith("ramp")
    assert found.chosen.verdict.gain_db > 0 and found.chosen.verdict.same_weights_db is None


def test_recording_that_does_not_fit_is_refused(loaded, tmp_path):
    """Before anything runs."""
    with pytest.raises(ValueError, match="memory must be at least"):
        tune(
            loaded.pipe, PROMPTS, call=loaded.call, target_speedup=2.0,
            out=tmp_path / "a.json", settings=Settings(memory=1000, groups=0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"), ({"target_speedup": 2.0, "pareto": True}, "exactly one"),
        ({"target_speedup": 0.5}, "target_speedup"), ({"target_psnr": 0.0}, "target_psnr"),
        ({"pareto": [1]}, "pareto must list counts from 2 to 7"),
        ({"target_speedup": 2.0, "held_back": 3}, "at least two"),
        ({"target_speedup": 2.0, "held_back": [PROMPTS[0]]}, "none in common"),
        ({"target_speedup": 100.0}, "target_speedup must be at most"),
    ],
)  # fmt: skip
def test_wrong_goals_are_refused(loaded, tmp_path, options, message):
    """By their names."""
    with pytest.raises(ValueError, match=message):
        tune(
            loaded.pipe, PROMPTS, call=loaded.call, out=tmp_path / "a.json", settings=FEW, **options
        )


def test_a_fidelity_is_reached_by_the_fewest_steps(monkeypatch):
    """Bisection over the number of computed steps."""

    class Fake:
        num_steps = 28

        def expect(self, counts):
            pass

        def point(self, count):
            verdict = Verdict(20.0 + count, 0, 0, 0, 1.0, 0, None, None, None, 1.0)
            return running.Point(count, None, "", 0.0, 0.0, verdict)

    points = running._reach(Fake(), 30.0)
    assert min(p.computed for p in points if p.verdict.psnr_db >= 30) == 10


@pytest.mark.slow
def test_command(tmp_path, loaded):
    """The recipes, the page with its pictures, exit codes."""
    folder, out = tmp_path / "model", tmp_path / "recipe.json"
    loaded.pipe.save_pretrained(folder)
    (folder / "flashomni.json").write_text(json.dumps({"call": loaded.call}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\n" + "\n".join(PROMPTS) + "\n")
    arguments = ["tune", "--model", folder, "--prompts", prompts, "--out", out, "--tries", 0]
    runner = CliRunner()
    done = runner.invoke(
        app, [str(x) for x in (*arguments, "--pareto", "--computed", 4, "--computed", 3)]
    )
    assert done.exit_code == 0, done.output
    assert Recipe.load(out).tuned is not None
    assert Recipe.load(tmp_path / "recipe-4.json").schedule.steps[0] == 0
    page = (tmp_path / "recipe.tune" / "index.html").read_text()
    assert page.count("data:image/png") == 7 and "http" not in page.split("<body", 1)[-1]
    assert runner.invoke(app, [str(x) for x in arguments]).exit_code == 2
    prompts.write_text("only one\n")
    done = runner.invoke(app, [str(x) for x in (*arguments, "--pareto")])
    assert done.exit_code == 2 and "at least two" in done.output


def test_ramp_is_that_of_the_library():
    """As many computed steps as asked, the first and the last among them."""
    assert ramp_steps(9, 28) == Recipe.of("cached", computed=9, of=28).schedule.steps()
