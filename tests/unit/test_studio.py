"""The studio without its page: settings as controls, the queue, sessions, what is drawn."""

import dataclasses
import gc
import json
import threading
import weakref

import pytest
import torch
from PIL import Image

from flashomni.engine import Recipe
from flashomni.engine.recipe import methods, presets
from flashomni.lab import metrics, zoo
from flashomni.models import engine_of
from flashomni.policies import policies
from flashomni.studio import drawings, knobs, pictures
from flashomni.studio.events import Failed, Finished, Progress, Waiting, plain, streamed
from flashomni.studio.outcome import Ask, Row
from flashomni.studio.preview import Preview
from flashomni.studio.session import Session
from flashomni.studio.shelf import Shelf
from flashomni.studio.tuning import tune_for
from flashomni.studio.turns import Cancelled, Turns

STEPS = 6
LATE = 20  # seconds after which a thread that should have ended has not
ASK = Ask("a red circle", steps=STEPS)
# Settings that are neither a value nor a list of numbers; the recipe's JSON has them.
NO_CONTROL = {*knobs.NO_CONTROL, "forecast.fitted", "sparse.amounts", "policy.stride"}


def small():
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    loaded.call.update(height=64, width=64, num_inference_steps=STEPS)
    return loaded


@pytest.fixture(scope="module")
def shelf():
    """Every name but one is the same small pipeline."""

    def load(name, device, dtype):
        if name == "bad":
            raise ValueError("model 'bad' cannot be loaded: it is bad")
        return small()

    return Shelf("cpu", torch.float32, load)


@pytest.fixture(scope="module")
def kept(shelf):
    """Pages hold a pipeline only while they are open: this one stays for the module."""
    return shelf.take("small")


@pytest.fixture
def session(shelf, kept):
    session = Session(shelf, "small")
    yield session
    session.close()


@pytest.fixture(scope="module")
def outcome(shelf, kept):
    session = Session(shelf, "small", Recipe.of("balanced", min_steps=0))
    yield last(session.generate(ASK)).value
    session.close()


def last(events):
    return list(events)[-1]


# Settings as controls.


@pytest.mark.parametrize("name", [*presets(), *methods(), *policies()])
def test_every_setting_of_a_recipe_has_a_control(name):
    """A new setting has one too, or is named here."""
    recipe = Recipe.of(name)
    found = {knob.key: knob for knob in knobs.knobs(recipe, 28)}
    wanted = {
        f"{part}.{field.name}"
        for part in knobs.PARTS
        for field in dataclasses.fields(getattr(recipe, part))
    } - {"forecast.name"}
    assert wanted - set(found) <= NO_CONTROL
    assert {(k.key, k.owner) for k in found.values()} <= {(k.key, k.owner) for k in knobs.every(28)}
    for knob in found.values():
        assert knob.says, f"{knob.key} does not say what it does"
        if knob.kind == "choice":
            assert knob.value in knob.choices
        elif knob.kind in ("integer", "number") and knob.value is not None:
            assert knob.low <= knob.value <= knob.high


@pytest.mark.parametrize("name", ["balanced", "sta", "teacache", "pab"])
def test_a_control_that_does_not_move_changes_nothing(name):
    """The page's numbers are floats; the recipe's stay what they are."""
    recipe = Recipe.of(name)
    for knob in knobs.knobs(recipe, 28):
        if knob.value is not None and knob.key != knobs.COMPUTED:
            value = float(knob.value) if knob.kind == "integer" else knob.value
            assert knobs.turned(recipe, knob.key, value, 28) == recipe, knob.key


def test_every_control_is_in_one_group():
    """And what matters is in the first ones."""
    found = knobs.knobs(Recipe.of("balanced"), 28)
    groups = knobs.grouped(found)
    assert sorted(k.key for group in groups for k in group) == sorted(k.key for k in found)
    assert len(groups) == len(knobs.GROUPS) and groups[0][0].key == knobs.COMPUTED
    assert {"policy.tau_kv", "policy.protect_text", "sparse.summaries", "sparse.refresh"} <= {
        knob.key for knob in groups[2]
    }


def test_computed_steps_move_whatever_the_schedule_was():
    """A ramp of as many; schedules that decide as they go have no such control."""
    turned = knobs.turned(Recipe.of("balanced"), knobs.COMPUTED, 5.0, 20)
    assert knobs.computed_steps(turned, 20) == 5
    late = Recipe.of("teacache")
    assert knobs.computed_steps(late, 20) is None
    assert knobs.COMPUTED not in [knob.key for knob in knobs.knobs(late, 20)]


def test_turning_a_control(session):
    """Dotted keys, parts by name, lists as on the command line; a wrong value changes nothing."""
    assert session.turn("sparse.carry", "hold").sparse.carry == "hold"
    assert session.turn("policy", "topk").policy.name == "topk"
    assert session.turn("policy.kv_density", 0.25).policy.kv_density == 0.25
    assert session.turn("sparse.choose_at", "[0,5]").sparse.choose_at == (0, 5)
    assert knobs.changes(session.base, session.recipe) == [
        "policy topk", "kv density 0.25", "choose at (0, 5)", "carry hold",
    ]  # fmt: skip
    before = session.recipe
    for key, value in (("policy.kv_density", 2.0), ("schedule.computed", 1), ("moon.phase", 1)):
        with pytest.raises(ValueError):
            session.turn(key, value)
    assert session.recipe == before and before.name == "balanced-edited"


def test_an_emptied_box_is_refused(session):
    """Like any other value that is not allowed."""
    with pytest.raises(ValueError, match="computed steps must be a number"):
        session.turn(knobs.COMPUTED, None)


def test_the_recipe_as_a_file(session):
    """What is downloaded is the recipe; a name is no path."""
    session.turn("schedule.computed", 4)
    assert Recipe.load(session.recipe_file()) == session.recipe
    session.choose(session.recipe.replace(name="../../etc/x y"))
    path = session.recipe_file()
    assert path.parent == session.folder and Recipe.load(path) == session.recipe


# Turns and streams.


def test_turns_are_first_come_first_served():
    """Each hears how many are in front; one that gives up lets the next one move up."""
    turns, order, started = Turns(), [], []
    gate = threading.Event()

    def run(number, stop, told):
        try:
            with turns.mine(stop, told.append):
                order.append(number)
                gate.wait(LATE)
        except Cancelled:
            order.append(f"{number} gave up")

    for number in range(3):
        stop, told = threading.Event(), []
        thread = threading.Thread(target=run, args=(number, stop, told))
        thread.start()
        while len(turns) <= number:
            pass
        started.append((thread, stop, told))
    started[1][1].set()
    started[1][0].join(LATE)
    gate.set()
    for thread, _, _ in started:
        thread.join(LATE)
    assert order == [0, "1 gave up", 2] and len(turns) == 0
    assert started[0][2] == [] and started[2][2][0] == 2


def test_a_stream_drops_progress_that_nobody_read():
    """And nothing else; the end is always told."""
    gate, stop = threading.Event(), threading.Event()

    def work(emit):
        for step in range(5):
            emit(Progress("dense", step, 5))
        emit(Waiting(1))
        emit(Progress("dense", 5, 5))
        gate.set()
        return "all"

    events = streamed(work, stop)
    first = next(events)
    gate.wait(LATE)
    rest = list(events)
    assert Waiting(1) in [first, *rest] and rest[-1] == Finished("all") and stop.is_set()


def test_an_error_ends_a_stream():
    """With the error."""

    def work(emit):
        raise KeyError("moon")

    event = last(streamed(work, threading.Event()))
    assert isinstance(event, Failed) and plain(event.error) == "KeyError: 'moon'"


# Sessions.


def test_a_run_compares_with_the_stock_pipeline(outcome, kept):
    """Dense, accelerated, distance; nothing stays on the pipeline."""
    assert outcome.dense.pixels.shape == outcome.accelerated.shape == (1, 3, 64, 64)
    assert outcome.speedup > 0 and outcome.distance.psnr_db > 0 and outcome.flip > 0
    assert engine_of(kept.loaded.pipe) is None
    assert Row.of(outcome).computed < STEPS


@pytest.mark.slow
def test_steps_are_seen_and_the_dense_result_is_used_again(session):
    """Every run shows pictures of both sides; a second recipe needs no second dense run."""
    seen = list(session.generate(ASK))
    stages = {event.stage for event in seen if isinstance(event, Progress)}
    assert {"dense", "accelerated"} <= stages
    assert any(isinstance(event, Progress) and event.preview is not None for event in seen)
    first = seen[-1].value
    session.turn(knobs.COMPUTED, 2)
    second = last(session.generate(ASK)).value
    assert second.reused and second.dense is first.dense
    other = last(session.generate(dataclasses.replace(ASK, seed=1))).value
    assert not other.reused and session.rows[0].recipe == "balanced"


def test_a_cancelled_run_leaves_nothing_behind(session, kept):
    """It ends at its next step; the page can go on, and so can others."""
    events = session.generate(ASK)
    for event in events:
        if isinstance(event, Progress) and event.stage == "dense":
            session.cancel()
            break
    end = last(events)
    assert isinstance(end, Failed) and isinstance(end.error, Cancelled)
    assert len(kept.turns) == 0 and engine_of(kept.loaded.pipe) is None
    again = last(session.generate(dataclasses.replace(ASK, dense=False, steps=2))).value
    assert again.dense is None and again.distance is None


def test_a_page_that_is_gone_ends_its_run(session, kept):
    """Closing the generator is all that a server does."""
    events = session.generate(dataclasses.replace(ASK, steps=500))
    next(events)
    events.close()
    stop, told = threading.Event(), []
    with kept.turns.mine(stop, told.append):
        assert len(kept.turns) == 1


def test_two_pages_share_a_pipeline_and_nothing_else(shelf, kept, session):
    """One waits for the other; recipes and results stay apart."""
    other = Session(shelf, "small", "quality")
    file = other.recipe_file()
    assert other.shelved is session.shelved
    session.turn(knobs.COMPUTED, 2)
    assert other.recipe == Recipe.of("quality")
    short = dataclasses.replace(ASK, dense=False)
    with kept.turns.mine(threading.Event(), lambda place: None):
        ours = session.generate(short)
        assert next(ours) == Waiting(1)
        theirs = other.generate(dataclasses.replace(short, seed=3))
        assert next(theirs) == Waiting(2)
    outcomes = [last(ours).value, last(theirs).value]
    assert [session.outcome, other.outcome] == outcomes
    assert not torch.equal(outcomes[0].accelerated, outcomes[1].accelerated)
    other.close()
    assert not file.exists() and session.recipe_file().exists()


def test_a_page_does_one_thing_at_a_time(session):
    """A second click is refused in a sentence."""
    events = session.generate(ASK)
    next(events)
    with pytest.raises(RuntimeError, match="at work already"):
        session.load("other")
    assert isinstance(last(session.generate(ASK)), Failed)


def test_a_second_click_leaves_the_first_run_to_be_cancelled(session, kept):
    """The run that was refused is not the one that is meant."""
    events = session.generate(dataclasses.replace(ASK, steps=500))
    next(events)
    assert isinstance(last(session.generate(ASK)), Failed)
    session.cancel()
    end = last(events)
    assert isinstance(end, Failed) and isinstance(end.error, Cancelled)
    assert len(kept.turns) == 0


def test_a_page_that_goes_behind_the_last_step_keeps_nothing(session, monkeypatch):
    """Gradio holds the session for an hour; what it made would stay as long."""
    compare = metrics.compare

    def close(*args, **kwargs):
        session.close()
        return compare(*args, **kwargs)

    monkeypatch.setattr(metrics, "compare", close)
    end = last(session.generate(ASK))
    assert isinstance(end, Failed) and isinstance(end.error, Cancelled)
    assert session.outcome is None and session.rows == []


def test_a_closed_page_lets_go_and_can_come_back():
    """The pipeline is forgotten when nobody else has it, and loaded anew if the page is back."""
    shelf = Shelf("cpu", torch.float32, lambda name, device, dtype: small())
    session = Session(shelf, "a")
    first = weakref.ref(session.shelved)
    path = session.recipe_file()
    session.close()
    gc.collect()
    assert first() is None and not path.exists()
    assert session.shelved.name == "a" and session.recipe_file() == path
    session.close()


def test_a_page_that_nobody_closes_leaves_no_files(shelf, kept):
    """One that was open when the server ended, or came back and was left."""
    session = Session(shelf, "small")
    session.close()
    folder = session.recipe_file().parent
    del session
    gc.collect()
    assert not folder.exists()


def test_a_bad_model_keeps_what_was_loaded(session, kept):
    """The error says what is wrong, the session goes on with the old one."""
    for name, words in (("bad", "cannot be loaded"), ("  ", "folder or a Hub id")):
        with pytest.raises(ValueError, match=words):
            session.load(name)
        assert session.shelved is kept


def test_a_pipeline_is_loaded_once_and_forgotten_when_nobody_has_it():
    """Two pages share one; after both it is loaded anew."""
    loads = []

    def load(name, device, dtype):
        loads.append(name)
        return small()

    shelf = Shelf("cpu", torch.float32, load)
    first = shelf.take("a")
    assert shelf.take(" a ") is first and loads == ["a"]
    del first
    shelf.take("a")
    assert loads == ["a", "a"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"steps": 0}, "steps"), ({"seed": -1}, "seed"), ({"size": {"height": 0}}, "height")],
)
def test_what_cannot_be_generated_is_refused(wrong, words):
    """By name."""
    with pytest.raises(ValueError, match=words):
        Ask("x", **wrong)


@pytest.mark.slow
def test_tuning_for_a_prompt(session):
    """A recipe of as many steps that the page takes, or the ramp's figures."""
    events = list(tune_for(session, ASK, 3, tries=0))
    found = events[-1].value
    assert any(isinstance(event, Progress) and event.total for event in events)
    assert "3 of 6 steps" in found.says
    if found.recipe is None:
        assert session.recipe == Recipe.of("balanced")
    else:
        assert session.recipe == found.recipe
        assert knobs.computed_steps(session.recipe, STEPS) == 3
    with pytest.raises(ValueError, match="computed steps"):
        tune_for(session, ASK, STEPS, tries=0)


# What is seen.


def test_a_preview_of_flow_matching_is_where_it_is_heading():
    """On a straight path every step shows the end."""
    loaded = small()
    pipe = loaded.pipe
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.25], mu=1.0)
    sigmas = pipe.scheduler.sigmas
    end, noise = torch.randn(1, 256, 16), torch.randn(1, 256, 16)
    at = [(1 - s) * end + s * noise for s in sigmas]
    preview = Preview(pipe, {"height": 64, "width": 64})
    preview(0, at[1])
    seen = preview(1, at[2])
    whole = Preview(pipe, {"height": 64, "width": 64})(2, end)
    gap = torch.tensor(list(seen.tobytes())) - torch.tensor(list(whole.tobytes()))
    assert seen.size == whole.size and gap.abs().max() <= 1


def test_a_preview_that_cannot_be_made_says_why_once():
    """And the run goes on."""
    preview = Preview(small().pipe, {})
    assert preview(0, torch.zeros(2)) is None and "FluxPipeline" in preview.why_not
    assert preview(1, None) is None


def test_what_was_typed_is_text(outcome):
    """In progress, notes, tables and errors."""
    bad = "<img src=x onerror=alert(1)>"
    row = Row(bad, 1, 2, 1.0, None, None, None, 0.5)
    marked = dataclasses.replace(outcome, note=bad)
    for shown in (
        drawings.text(bad, "error"),
        drawings.stage(Progress(bad, 1, 2), None, 0.0),
        drawings.figures(marked),
        drawings.history([row]),
    ):
        assert "<img" not in shown and "&lt;img" in shown


def test_drawings_show_every_layer_and_every_step(outcome):
    """Each step once in each layer's row, of both maps; each call of the model has a bar."""
    summary = outcome.summary
    layers, steps = len(summary.layers), len(summary.steps)
    cells = drawings.density(outcome).split('class="fo-cells"')[1:]
    assert len(cells) == 2
    for part in cells:
        widths = [
            int(w.partition('"')[0]) for w in part.partition("</svg>")[0].split('width="')[1:]
        ]
        assert sum(widths) == layers * steps
    bars = drawings.times(outcome).partition('class="fo-calls"')[2].partition("</svg>")[0]
    assert bars.count("<rect") == steps
    assert "identical" in drawings.figures(same(outcome))


def same(outcome):
    from flashomni.lab import metrics

    distance = metrics.compare(outcome.accelerated, outcome.accelerated, ("dense", "accelerated"))
    return dataclasses.replace(outcome, distance=distance, flip=0.0)


def test_pictures_of_two_videos(tmp_path):
    """Side by side in one animation; a frame's difference and FLIP map."""
    dense = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    accelerated = (dense + 0.01).clamp(0, 1)
    path = pictures.side_by_side(dense, accelerated, tmp_path / "both.webp")
    with Image.open(path) as both:
        assert both.n_frames == 3 and both.size == (2 * 24 + pictures.GAP, 16)
    gap, factor = pictures.difference(dense[0], accelerated[0])
    assert factor > 1 and gap.size == (24, 16)
    assert pictures.flip(dense[0], accelerated[0]).size == (24, 16)
    assert pictures.flip(dense[0], accelerated[0] * torch.nan) is None


def test_the_command_says_what_to_install(monkeypatch):
    """Without the extra, in one sentence."""
    import importlib.util

    from typer.testing import CliRunner

    from flashomni.cli import app

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a)
    )
    done = CliRunner().invoke(app, ["studio"])
    assert done.exit_code == 2 and "pip install 'flashomni[studio]'" in done.output


def test_a_recipe_that_is_no_recipe_is_refused(session, tmp_path):
    """A file that somebody opens."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"policy": {"name": "moon"}}))
    with pytest.raises(ValueError, match="moon"):
        session.choose(path)
    assert session.recipe == Recipe.of("balanced")
