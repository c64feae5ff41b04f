"""Groups of layers in ``flashomni.tune``, end to end on a toy of which a part stands still."""

import json
from dataclasses import replace

import pytest
import torch

from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.models import accelerate
from flashomni.tuning import Settings, layer_groups, spending, tune
from flashomni.tuning.page import of_layers
from flashomni.tuning.validate import HeldBack

PROMPTS = ["a red circle", "a blue square", "a green ring"]
FEW = Settings(tries=0, starts=2, probes=3, probed=1, sparse=0)
STEPS = 8


@pytest.fixture(scope="module")
def still():
    """A pipeline whose dual blocks add the same in each step, whatever they get."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=2, single=1)
    loaded.call.update(height=64, width=64, num_inference_steps=STEPS)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in loaded.pipe.transformer.transformer_blocks:
            last = block.attn.to_out[0], block.attn.to_add_out, block.ff.net[2]
            for linear in (*last, block.ff_context.net[2]):
                linear.weight.zero_(), linear.bias.normal_(generator=draws).mul_(0.3)
            for norm in (block.norm1, block.norm1_context):
                norm.linear.weight.zero_(), norm.linear.bias.normal_(generator=draws)
    return loaded


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a recipe by its layers: a step of all takes one. Both kinds take about as long."""

    def seconds(recipe):
        steps = [len(group.schedule.steps) for group in recipe.groups if group.schedule]
        if steps:
            return clock.slower * sum(steps) / 2
        return clock.tiles if recipe.groups else float(len(recipe.schedule.steps))

    def timed(driver, recipe, *rest):
        return replace(measure(driver, recipe, *rest), seconds=seconds(recipe))

    def run(held, recipe, computed):
        found, picture = generate(held, recipe, computed)
        return [replace(each, seconds=seconds(recipe)) for each in found], picture

    clock.slower, clock.tiles = 1.0, float(STEPS)
    measure, generate = spending.timed, HeldBack.run
    monkeypatch.setattr(spending, "timed", timed)
    monkeypatch.setattr(HeldBack, "run", run)
    monkeypatch.setattr(layer_groups.LayerGroups, "shares", (0.5, 0.5))
    return clock


@pytest.fixture(scope="module")
def known():
    """What does not depend on the clock, by name: found once for all tests."""
    return {}


@pytest.fixture
def tuned(still, clock, known, tmp_path):
    """Tunes for four steps, and goes on with what is known; takes further arguments of ``tune``."""
    state = tmp_path / "mine.tune" / "state.json"
    if known:
        state.parent.mkdir()
        state.write_text(json.dumps(known))

    def run(**more):
        options = {"call": still.call, "pareto": [4], "settings": FEW, **more}
        found = tune(still.pipe, PROMPTS, out=tmp_path / "mine.json", **options).chosen
        kept = json.loads(state.read_text())
        by_clock = ("point", "sparse", "apart", "recorded")
        kept["found"] = {k: v for k, v in kept["found"].items() if not k.startswith(by_clock)}
        kept["found"]["recorded 0"] = kept["found"]["recorded 1"] = 1.0
        known.update(kept)
        return found

    return run


@pytest.mark.slow
def test_layers_that_stand_still_are_computed_once(still, tuned, known, tmp_path):
    """The others have their seconds; the recipe says so, runs so, and is as good as it was said."""
    said = []
    found = tuned(on_note=said.append)
    assert "what layers 0:2, 2:3 add at most" in said[0]
    recipe = Recipe.load(tmp_path / "mine.json")
    assert recipe == found.recipe and not recipe.at_output
    slow, fast = recipe.groups
    assert (slow.layers, fast.layers) == ("0:2", "2:3")
    assert len(slow.schedule.steps) < 4 < len(fast.schedule.steps)
    chosen = found.divided.chosen
    assert chosen.surplus > 5 and found.divided.tried[0].predicted_db > 5
    plain = found.verdict.psnr_db + chosen.loss_db  # about
    assert found.verdict.psnr_db > plain + 5 and found.verdict.beats
    assert "pay, layers 0:2 in " in of_layers(found)
    report = json.loads((tmp_path / "mine.tune" / "report.json").read_text())
    assert report["points"][0]["divided"]["parts"] == ["0:2", "2:3"]
    # Dispatch steps that compute tiles take as long as all steps do here, and are not worth it.
    tiles = [each for each in found.divided.tried if each.tiles]
    assert [each.words for each in tiles] == ["tau_q 0.9, S_q 0"] and tiles[0].surplus < 0
    with accelerate(still.pipe, recipe) as engine:
        still.pipe(PROMPTS[0], **still.call, output_type="latent")
        computed = sum(step["kind"] != "dispatch" for step in engine.report().steps)
    assert computed == len(fast.schedule.steps)
    calls = []
    again = tuned(on_progress=lambda *told: calls.append(told))
    assert again.recipe == recipe and not calls


@pytest.mark.slow
def test_groups_that_take_too_long_are_refused(clock, tuned):
    """However good they are: plans of the output that take as long are better."""
    clock.slower = 2.2
    found = tuned()
    assert found.recipe.at_output and not found.recipe.groups
    assert found.divided.chosen is None and max(x.surplus for x in found.divided.tried) < 0
    assert "do not pay" in of_layers(found)


@pytest.mark.slow
def test_tiles_in_dispatch_steps_are_taken_where_they_pay(clock, tuned):
    """Nearly everything is computed here, which would be worth it if it took next to no time."""
    clock.slower, clock.tiles = 9.0, 4.1
    found = tuned()
    (group,) = found.recipe.groups
    assert group.layers == ":" and group.policy.tau_q > 0 and group.sparse.degrade_below < 1
    assert found.divided.chosen.tiles and found.divided.chosen.loss_db < -3
    assert not found.recipe.at_output and found.recipe.forecast.order == 2
    assert "pay, tau_q " in of_layers(found) and "as long as all steps" in of_layers(found)
    assert len([each for each in found.divided.tried if each.tiles]) == 2


@pytest.mark.slow
def test_what_does_not_pay_on_prompts_kept_back_is_left_out(tuned, monkeypatch):
    """There it is slower than it was."""

    def later(held, recipe, computed):
        found, picture = run(held, recipe, computed)
        return [replace(x, seconds=99.0 if recipe.groups else x.seconds) for x in found], picture

    run = HeldBack.run
    monkeypatch.setattr(HeldBack, "run", later)
    found = tuned()
    assert found.divided.chosen is not None and not found.recipe.groups
    assert "do not pay on prompts kept back" in of_layers(found)


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on(tuned, monkeypatch):
    """With what was seen of the groups, and what was tried."""

    class Stop(Exception):
        pass

    def stop(measure, recipe, useless):
        asked.append(recipe)
        if len(asked) == 4:  # behind the plan, another ramp, and the plan again
            raise Stop
        return run(measure, recipe, useless)

    asked, run = [], spending.Spending.run
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(spending.Spending, "run", stop)
        tuned()
    late, timed = [], spending.timed
    with monkeypatch.context() as patch:
        patch.setattr(layer_groups.LayerGroups, "watch", lambda self: pytest.fail("was seen"))
        patch.setattr(spending, "timed", lambda *args: late.append(args[1]) or timed(*args))
        found = tuned()
    assert asked[3] == late[0] and not any(each in late for each in asked[:3])
    assert len(found.recipe.groups) == 2


@pytest.mark.slow
def test_a_model_that_nobody_knows_has_no_groups(tuned, monkeypatch):
    """It is tuned at the level of the output alone."""

    def unknown(model):
        raise ValueError("transformer must be one of ...")

    monkeypatch.setattr(layer_groups, "find_adapter", unknown)
    found = tuned()
    assert found.divided is None and "were not tried" in of_layers(found)


def test_one_group_is_none(still, tmp_path):
    """The error says what may be asked for."""
    with pytest.raises(ValueError, match="groups must be 0 for none, or at least 2, got 1"):
        tune(still.pipe, PROMPTS, call=still.call, pareto=[4], out=tmp_path / "a.json",
             settings=replace(FEW, groups=1))  # fmt: skip
