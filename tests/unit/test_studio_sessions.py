"""The studio without its page: turns, streams of events, and pages that share a pipeline."""

import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from studio_parts import ASK, LATE, STEPS, last, small

from flashomni.engine import Recipe
from flashomni.lab import metrics
from flashomni.models import engine_of
from flashomni.studio import knobs
from flashomni.studio.events import Failed, Finished, Progress, Waiting, plain, streamed
from flashomni.studio.outcome import Ask, Row
from flashomni.studio.session import Session
from flashomni.studio.shelf import Shelf
from flashomni.studio.tuning import tune_for
from flashomni.studio.turns import Cancelled, Turns

pytest_plugins = ["studio_pages"]


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


def test_a_shelf_for_strangers_loads_what_it_was_started_with(shelf):
    """Whatever they name: a Hub id would have the machine fetch it."""
    loads = []

    def load(name, device, dtype):
        loads.append(name)
        return small()

    few = Shelf("cpu", torch.float32, load, only=["a", " b"])
    session = Session(few, "a")
    for name in ("c", "org/name", "../a", "A"):
        with pytest.raises(ValueError, match="model must be a, b, which this page was started"):
            session.load(name)
    assert session.load(" b ").name == "b" and loads == ["a", "b"]
    session.close()


@pytest.mark.parametrize("only", [None, ["small"]], ids=str)
def test_strangers_learn_of_no_file_by_a_recipe(kept, tmp_path, only):
    """A page with any model, which only friends reach, may name a file; one with some may not."""
    there = tmp_path / "there.safetensors"
    there.touch()
    shelf = Shelf("cpu", torch.float32, lambda *_: kept.loaded, only=only)
    session, said = Session(shelf, "small"), set()
    for path in (there, tmp_path / "missing"):
        file = tmp_path / "recipe.json"
        made = Recipe.of("flashomni", symbols=str(path), name="uploaded")
        made.save(file)
        if only is None:
            assert session.choose(file).sparse.symbols == str(path)
            continue
        with pytest.raises(ValueError, match=r"sparse\.symbols must be left out") as refused:
            session.choose(file)
        said.add(str(refused.value).replace(str(path), ""))
        with pytest.raises(ValueError, match=r"sparse\.symbols must be left out"):
            session.turn("sparse.symbols", str(path))
        assert session.recipe == session.base == Recipe.of("balanced")
    assert len(said) == (only is not None)
    session.close()


def test_a_page_keeps_the_file_that_its_server_named(kept, tmp_path):
    """Whoever starts it knows the file; a control that is moved does not refuse it."""
    own = Recipe.of("flashomni", symbols=str(tmp_path / "own.safetensors"), name="own")
    shelf = Shelf("cpu", torch.float32, lambda *_: kept.loaded, only=["small"])
    session = Session(shelf, "small", own)
    assert session.turn("policy.tau_q", 0.25).sparse.symbols == own.sparse.symbols
    assert session.choose(own) == own
    session.close()


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
    told = [event for event in events if isinstance(event, Progress)]
    assert any(event.total for event in told)
    assert {event.stage for event in told if event.preview} == {"tuning: recording"}
    assert "3 of 6 steps" in found.says
    if found.recipe is None:
        assert session.recipe == Recipe.of("balanced")
    else:
        assert session.recipe == found.recipe
        assert knobs.computed_steps(session.recipe, STEPS) == 3
    with pytest.raises(ValueError, match="computed steps"):
        tune_for(session, ASK, STEPS, tries=0)


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
