"""The page: what its parts do, and the server that gives it out."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from flashomni.engine import Recipe
from flashomni.studio import drawings, knobs, pictures
from flashomni.studio.events import Event, Failed, Finished, Progress, Waiting, plain
from flashomni.studio.outcome import Ask, Outcome
from flashomni.studio.panels import SIZES, AskPanel, RecipePanel, ResultPanel
from flashomni.studio.session import Session
from flashomni.studio.shelf import Shelf
from flashomni.studio.tuning import TunedFor, tune_for
from flashomni.studio.turns import Cancelled

log = logging.getLogger("flashomni")
CSS = Path(__file__).with_name("style.css")
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # of the machine: nothing is fetched
CODE_FONTS = ["ui-monospace", "monospace"]
KEEP_FILES = (3600, 86400)  # seconds: how often old pictures are looked for, and how old they are
MANY = 1024  # pages that wait or run: each takes a thread and a place of Gradio's queue, both cheap
REDRAW = 0.08  # seconds: a page need not hear more often
Update = dict[Any, Any]


class Page:
    """Builds the page, once; each browser that opens it has a session.

    Args:
        shelf: of pipelines.
        model: that pages begin with.
        recipe: likewise.
    """

    def __init__(self, shelf: Shelf, model: str, recipe: Recipe | str = "balanced") -> None:
        self.shelf, self.model, self.recipe = shelf, model, recipe
        self.sessions: dict[str, Session] = {}  # of open pages, to close them
        self.kept = shelf.take(model)  # stays loaded, whoever comes and goes
        with gr.Blocks(
            title="FlashOmni studio",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=KEEP_FILES,
        ) as self.blocks:
            self.session = gr.State(None)
            gr.HTML(
                "<h1>FlashOmni studio</h1><p>What a recipe leaves out, what that saves, and what "
                "it costs in the picture.</p>",
                elem_id="fo-head",
            )
            # Seen when its session is there: nobody moves a control that has no recipe yet.
            with gr.Column(elem_id="fo-page", visible=False) as self.whole:
                with gr.Column(elem_id="fo-ask"):
                    self.ask = AskPanel.make(shelf.only)
                with gr.Column(elem_id="fo-recipe"):
                    self.parts = RecipePanel.make(Recipe.of(recipe), self.kept.num_steps)
                with gr.Column(elem_id="fo-result"):
                    self.result = ResultPanel.make()
            self._wire()

    def _wire(self) -> None:
        ask, parts, result = self.ask, self.parts, self.result
        asked = [ask.prompt, ask.seed, ask.steps, ask.live, *ask.sizes]
        buttons = [ask.compare, ask.alone, ask.cancel, ask.load, parts.tune]
        controls = parts.settings.controls
        recipe = [parts.message, parts.code, parts.download, *controls.values()]
        model = [ask.model, ask.line, ask.prompt, ask.steps, *ask.sizes]
        frame = [result.slider, result.difference, result.flip]
        shown = [*frame, result.single, result.frame, result.playback]
        run = [*buttons, *shown, result.stage, result.figures, result.density, result.times]
        run += [result.history, result.tabs]
        quick: dict[str, Any] = {
            "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private",
        }  # fmt: skip
        opened = [self.session, self.whole, parts.choice, *model, *recipe]
        self.blocks.load(self._open, None, opened, **quick)
        self.blocks.unload(self._left)
        for event in (ask.load.click, ask.model.input):
            event(self._load, [self.session, ask.model], [*model, *recipe], **quick)
        ask.steps.change(self._steps, [self.session, ask.steps], recipe, **quick)
        ask.dice.click(lambda: random.randrange(2**31), None, ask.seed, **quick)
        for button, dense in ((ask.compare, True), (ask.alone, False)):
            button.click(self._run(dense), [self.session, *asked], run, **quick)
        ask.cancel.click(_cancel, self.session, ask.cancel, queue=False, **quick)
        result.frame.input(
            self._frame, [self.session, result.frame], frame, trigger_mode="always_last", **quick
        )
        for place, control in controls.items():
            typed = isinstance(control, (gr.Textbox, gr.Number))  # read when it is complete
            for event in (control.blur, control.submit) if typed else (control.input,):
                event(
                    self._turned(place, control), [self.session, control], recipe,
                    trigger_mode="always_last", **quick,
                )  # fmt: skip
        parts.choice.input(self._choose, [self.session, parts.choice], recipe, **quick)
        parts.upload.upload(self._choose, [self.session, parts.upload], recipe, **quick)
        parts.tune.click(
            self._tune, [self.session, parts.tries, *asked],
            [*buttons, *recipe, result.stage, parts.verdict], **quick,
        )  # fmt: skip

    # The model and the recipe.

    def _open(self, request: gr.Request) -> Update:
        session = Session(self.shelf, self.model, self.recipe)
        self.sessions[str(request.session_hash)] = session
        return {
            self.session: session,
            self.whole: gr.update(visible=True),
            self.parts.choice: gr.update(value=session.base.name),
            **self._of_model(session),
            **self._of_recipe(session),
        }

    def _left(self, request: gr.Request) -> None:
        """A page was closed. Gradio keeps its state for an hour; what is large goes now."""
        session = self.sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()

    def _load(self, session: Session, name: str | None) -> Iterator[Update]:
        """Take another pipeline; a bad one changes nothing but the line below."""
        ask = self.ask
        yield {ask.line: drawings.text(f"loading {name}: this can take a while ...")}
        try:
            session.load(name or "")
        except Exception as error:  # whatever a foreign file raises, the page says it and lives
            log.info("studio: model %r", name, exc_info=True)
            kept = f"{plain(error)}. The page keeps {session.shelved.name}."
            yield {ask.line: drawings.text(kept, "error")}
            return
        yield {**self._of_model(session), **self._of_recipe(session)}

    def _of_model(self, session: Session) -> Update:
        ask, shelved = self.ask, session.shelved
        call = shelved.loaded.call
        sizes = {
            box: gr.update(value=call.get(name), visible=name in call or name != "num_frames")
            for name, box in zip(SIZES, ask.sizes, strict=True)
        }
        return {
            ask.model: gr.update(value=shelved.name),
            ask.line: drawings.text(shelved.says()),
            ask.prompt: shelved.loaded.prompt,
            ask.steps: gr.update(value=session.num_steps),
            **sizes,
        }

    def _of_recipe(self, session: Session, message: str = "", again: Any = None) -> Update:
        """What shows the recipe; ``message`` is an error, ``again`` a control that goes back."""
        parts = self.parts
        file = session.recipe_file()
        count = knobs.computed_steps(session.recipe, session.num_steps)
        computes = "decides as it goes which steps to compute"
        if count is not None:
            computes = f"computes {count} of {session.num_steps} steps"
        changed = ", ".join(knobs.changes(session.base, session.recipe))
        says = f"{session.recipe.name}: {computes}" + (f"; changed: {changed}" if changed else "")
        return {
            parts.message: drawings.text(message, "error") if message else drawings.text(says),
            parts.code: file.read_text(encoding="utf-8"),
            parts.download: gr.update(value=str(file)),
            **parts.settings.of(session, again),
        }

    def _choose(self, session: Session, recipe: str) -> Update:
        try:
            session.choose(recipe)
        except (ValueError, NotImplementedError) as error:
            return self._of_recipe(session, plain(error))
        return self._of_recipe(session)

    def _steps(self, session: Session | None, steps: float) -> Update:
        if session is None or int(steps) == session.num_steps:
            return {self.parts.message: gr.skip()}
        session.num_steps = int(steps)
        return self._of_recipe(session)

    def _turned(self, place: tuple[str, str], control: Any) -> Callable[[Session, Any], Update]:
        """What happens when the control of a setting is moved; a refused one goes back."""

        def move(session: Session, value: Any) -> Update:
            before = session.recipe
            try:
                session.turn(place[0], value)
            except (ValueError, NotImplementedError) as error:
                return self._of_recipe(session, plain(error), again=control)
            if session.recipe == before:
                return {control: gr.skip()}
            self.parts.settings.moved(session, place)
            return self._of_recipe(session)

        return move

    # Runs.

    def _run(self, dense: bool) -> Callable[..., Iterator[Update]]:
        def run(session: Session, *asked: Any) -> Iterator[Update]:
            def done(outcome: Outcome) -> Update:
                return {self.result.stage: _hidden(), **self._of_outcome(session, outcome)}

            yield from self._streamed(lambda: session.generate(_asked(dense, *asked)), done)

        return run

    def _tune(self, session: Session, tries: float, *asked: Any) -> Iterator[Update]:
        def begin() -> Iterator[Event]:
            ask = _asked(True, *asked)
            count = knobs.computed_steps(session.recipe, ask.steps) or math.ceil(ask.steps / 2.5)
            return tune_for(session, ask, count, int(tries))

        def done(found: TunedFor) -> Update:
            said = {self.result.stage: _hidden(), self.parts.verdict: drawings.text(found.says)}
            taken = {} if found.recipe is None else self._of_recipe(session)
            return {**said, **taken}

        yield from self._streamed(begin, done)

    def _streamed(
        self, begin: Callable[[], Iterator[Event]], done: Callable[[Any], Update]
    ) -> Iterator[Update]:
        """Show a run while it goes on, and its end; buttons follow."""
        stage, started, last, drawn = self.result.stage, time.perf_counter(), None, 0.0
        events: Iterator[Event] | None = None
        yield {
            stage: _shown(drawings.stage(Progress("starting", 0, 0), None, 0.0)),
            **self._buttons(True),
        }
        try:
            events = begin()
            for event in events:
                now = time.perf_counter()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    yield {**done(event.value), **self._buttons(False)}
                    return
                if isinstance(event, Progress) and event.preview is not None:
                    last = event.preview
                if isinstance(event, Waiting) or now - drawn > REDRAW:
                    drawn = now
                    yield {stage: drawings.stage(event, last, now - started)}
        except Cancelled:
            yield {stage: drawings.text("cancelled"), **self._buttons(False)}
        except Exception as error:  # of a pipeline, whatever it is: the page says it and lives
            log.info("studio: a run failed", exc_info=True)
            yield {stage: drawings.text(plain(error), "error"), **self._buttons(False)}
        finally:
            if events is not None:
                events.close()  # type: ignore[attr-defined]  # a page that is gone ends its run

    def _buttons(self, running: bool) -> Update:
        ask = self.ask
        others = (ask.compare, ask.load, self.parts.tune)
        return {
            ask.cancel: gr.update(visible=running, value="Cancel", interactive=True),
            ask.alone: gr.update(visible=not running),
            **{button: gr.update(interactive=not running) for button in others},
        }

    # Results.

    def _of_outcome(self, session: Session, outcome: Outcome) -> Update:
        result, count = self.result, len(outcome.accelerated)
        playback: Any = gr.update(visible=False)
        if count > 1:
            dense = None if outcome.dense is None else outcome.dense.pixels
            path = session.folder / f"playback-{len(session.rows)}.webp"
            pictures.side_by_side(dense, outcome.accelerated, path)
            label = "playback" if dense is None else "playback: dense | accelerated"
            playback = gr.update(value=str(path), visible=True, label=label)
        middle = count // 2
        return {
            result.figures: _shown(drawings.figures(outcome)),
            result.tabs: gr.update(visible=True),
            result.frame: gr.update(maximum=max(count - 1, 1), value=middle, visible=count > 1),
            result.playback: playback,
            result.density: drawings.density(outcome),
            result.times: drawings.times(outcome),
            result.history: drawings.history(session.rows),
            result.single: gr.update(
                value=pictures.picture(outcome.accelerated[middle]), visible=outcome.dense is None
            ),
            **self._of_frame(outcome, middle),
        }

    def _frame(self, session: Session, number: float) -> Update:
        if session.outcome is None:
            return {self.result.slider: gr.skip()}
        return self._of_frame(session.outcome, int(number))

    def _of_frame(self, outcome: Outcome, number: int) -> Update:
        """What is shown of one frame of both results."""
        result = self.result
        if outcome.dense is None:
            return {
                part: gr.update(visible=False)
                for part in (result.slider, result.difference, result.flip)
            }
        number = min(number, len(outcome.accelerated) - 1)
        dense, accelerated = outcome.dense.pixels[number], outcome.accelerated[number]
        gap, factor = pictures.difference(dense, accelerated)
        flip = pictures.flip(dense, accelerated)
        both = (pictures.picture(dense), pictures.picture(accelerated))
        return {
            result.slider: gr.update(value=both, visible=True),
            result.difference: gr.update(
                value=gap, visible=True, label=f"difference \N{MULTIPLICATION SIGN} {factor:g}"
            ),
            result.flip: gr.update(value=flip, visible=flip is not None),
        }


def _asked(
    dense: bool, prompt: str, seed: float, steps: float, live: bool, *sizes: float | None
) -> Ask:
    """What the page asks for; numbers come as floats, empty ones as ``None``."""
    size = {name: int(value) for name, value in zip(SIZES, sizes, strict=True) if value is not None}
    return Ask(prompt, int(seed or 0), int(steps), size, bool(live), dense)


def _shown(html: str) -> Any:
    return gr.update(value=html, visible=True)


def _hidden() -> Any:
    """An empty line takes room too."""
    return gr.update(value="", visible=False)


def _cancel(session: Session | None) -> Any:
    """The step that runs is finished first; the stage then says that it was the last."""
    if session is not None:
        session.cancel()
    return gr.update(value="Cancelling", interactive=False)


def serve(
    shelf: Shelf,
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    recipe: Recipe | str = "balanced",
) -> tuple[gr.Blocks, str]:
    """Give the page out, from threads of its own, until the app is closed.

    Args:
        shelf: of pipelines.
        model: that pages begin with.
        host: address to listen on.
        port: a free one from 7860 on if left out.
        share: also through Gradio's tunnel, for anybody who has the link; the shelf then must say
            which models may be loaded.
        recipe: that pages begin with.

    Returns:
        The app and its address.

    Raises:
        ValueError: the model cannot be loaded, or strangers could name any other.
        OSError: the port is taken.
    """
    if share and shelf.only is None:
        raise ValueError("share needs a shelf with only=[...]: anybody could load any model else")
    blocks = Page(shelf, model, recipe).blocks
    blocks.queue(default_concurrency_limit=None)
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="gray", font=FONTS, font_mono=CODE_FONTS,
        radius_size="sm", spacing_size="sm", text_size="md",
    )  # fmt: skip
    _, url, shared = blocks.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
        theme=theme, css=CSS.read_text(encoding="utf-8"), footer_links=[], ssr_mode=False,
        enable_monitoring=False, max_threads=MANY, show_error=False, run_history=False,
    )  # fmt: skip
    log.info("studio: %s %s", url, shared or "")
    return blocks, url
