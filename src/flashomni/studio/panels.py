"""The parts of the page, as Gradio components; what they do is in ``app``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from flashomni.engine import Recipe
from flashomni.engine.recipe import methods, presets
from flashomni.lab.zoo import BUNDLED
from flashomni.studio import drawings
from flashomni.studio.knobs import GROUPS, Knob, every, grouped, knobs
from flashomni.studio.session import Session

SIZES = ("width", "height", "num_frames")
TRIES = 3
FINE = 0.005  # of sliders over numbers; what is typed may lie between


@dataclass(frozen=True)
class AskPanel:
    """Model, prompt, seed, steps, size; the buttons."""

    model: gr.Dropdown
    load: gr.Button
    line: gr.HTML
    prompt: gr.Textbox
    seed: gr.Number
    dice: gr.Button
    steps: gr.Slider
    sizes: tuple[gr.Number, ...]
    live: gr.Checkbox
    compare: gr.Button
    alone: gr.Button
    cancel: gr.Button

    @classmethod
    def make(cls, only: Sequence[str] | None = None) -> AskPanel:
        """With any model, or with ``only`` those."""
        info = "a name, a diffusers folder, or a Hub id"
        with gr.Row(elem_classes="fo-bottom"):
            model = gr.Dropdown(
                list(BUNDLED if only is None else only), label="Model",
                info=info if only is None else "those that this page was started with",
                allow_custom_value=only is None, scale=4, min_width=160, elem_id="model",
            )  # fmt: skip
            load = gr.Button("Load", size="sm", scale=0, min_width=76, elem_id="load")
        line = gr.HTML(elem_id="model-line")
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="prompt")
        steps = gr.Slider(1, 100, 28, step=1, label="Steps", elem_id="steps")
        with gr.Row(elem_classes="fo-bottom"):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90, elem_id="seed")
            dice = gr.Button("New seed", size="sm", scale=0, min_width=76, elem_id="dice")
        with gr.Accordion("Size and preview", open=False), gr.Row():
            sizes = tuple(
                gr.Number(
                    None, label=name.replace("num_", ""), precision=0, minimum=1, min_width=80,
                    elem_id=name,
                )
                for name in SIZES
            )  # fmt: skip
            live = gr.Checkbox(
                True, label="live preview", info="its time is not counted", min_width=140
            )
        with gr.Row():
            compare = gr.Button(
                "Compare", variant="primary", size="md", scale=1, min_width=100, elem_id="compare"
            )
            alone = gr.Button("Accelerate only", size="md", scale=1, min_width=100, elem_id="alone")
            cancel = gr.Button(
                "Cancel", variant="stop", size="md", scale=1, min_width=100, visible=False,
                elem_id="cancel",
            )  # fmt: skip
        return cls(
            model, load, line, prompt, seed, dice, steps, sizes, live, compare, alone, cancel
        )


@dataclass(frozen=True)
class RecipePanel:
    """Which recipe, its settings, itself as a file, and tuning."""

    choice: gr.Dropdown
    upload: gr.UploadButton
    message: gr.HTML
    code: gr.Code
    download: gr.DownloadButton
    settings: Settings
    tries: gr.Slider
    tune: gr.Button
    verdict: gr.HTML

    @classmethod
    def make(cls, recipe: Recipe, num_steps: int) -> RecipePanel:
        """The panel, showing a recipe."""
        with gr.Row(elem_classes="fo-bottom"):
            choice = gr.Dropdown(
                recipe_choices(), label="Recipe", info="a preset, or a published method",
                scale=4, min_width=160, elem_id="recipe",
            )  # fmt: skip
            upload = gr.UploadButton(
                "Open file", file_types=[".json", ".yaml", ".yml"], size="sm", scale=0,
                min_width=76, elem_id="open-recipe",
            )  # fmt: skip
        message = gr.HTML(elem_id="recipe-line")
        settings = Settings(recipe, num_steps)
        download = gr.DownloadButton("Download recipe", size="md", elem_id="download")
        with gr.Accordion("Tune for this prompt", open=False):
            gr.Markdown(
                "Finds the steps to compute and the weights of the forecast on this prompt, for as "
                "many computed steps as above, and tries them on another."
            )
            tries = gr.Slider(
                0, 12, TRIES, step=1, label="tries", info="more is slower and better",
                elem_id="tries",
            )  # fmt: skip
            tune = gr.Button("Tune for this prompt", elem_id="tune")
            verdict = gr.HTML(elem_id="verdict")
        with gr.Accordion("Recipe as JSON", open=False):
            code = gr.Code(language="json", show_label=False, interactive=False, elem_id="code")
        return cls(choice, upload, message, code, download, settings, tries, tune, verdict)


@dataclass(frozen=True)
class ResultPanel:
    """What goes on, and what came of it."""

    stage: gr.HTML
    figures: gr.HTML
    tabs: gr.Tabs
    slider: gr.ImageSlider
    single: gr.Image
    frame: gr.Slider
    playback: gr.Image
    difference: gr.Image
    flip: gr.Image
    density: gr.HTML
    times: gr.HTML
    history: gr.HTML

    @classmethod
    def make(cls) -> ResultPanel:
        stage = gr.HTML(drawings.welcome(), elem_id="stage")
        figures = gr.HTML(elem_id="figures", visible=False)
        hidden: dict[str, Any] = {
            "format": "png", "interactive": False, "visible": False, "min_width": 240,
            "buttons": ["download", "fullscreen"],
        }  # fmt: skip
        with gr.Tabs(elem_id="tabs", visible=False, overflow_behavior="wrap") as tabs:
            with gr.Tab("Compare"):
                slider = gr.ImageSlider(
                    label="dense | accelerated", max_height=620, elem_id="slider", visible=False,
                    interactive=False, format="png",
                )  # fmt: skip
                single = gr.Image(label="accelerated", elem_id="single", **hidden)
                frame = gr.Slider(0, 1, 0, step=1, label="frame", visible=False, elem_id="frame")
                playback = gr.Image(
                    label="playback: dense | accelerated", elem_id="playback", visible=False,
                    interactive=False, type="filepath", format="webp",
                )  # fmt: skip
            with gr.Tab("Difference"), gr.Row():
                difference = gr.Image(label="difference", elem_id="difference", **hidden)
                flip = gr.Image(label="FLIP: what an eye sees", elem_id="flip", **hidden)
            with gr.Tab("Computed"):
                density = gr.HTML(elem_id="density")
            with gr.Tab("Time"):
                times = gr.HTML(elem_id="times")
            with gr.Tab("Runs"):
                history = gr.HTML(drawings.history(()), elem_id="history")
        return cls(
            stage, figures, tabs, slider, single, frame, playback, difference, flip, density,
            times, history,
        )  # fmt: skip


def recipe_choices() -> list[tuple[str, str]]:
    """Presets first, then what papers call their methods."""
    return [(name, name) for name in presets()] + [(f"{name} (paper)", name) for name in methods()]


class Settings:
    """A control for every setting there is, of which those of the page's recipe are seen.

    They are made once: what is drawn anew while somebody moves it would slip from their hand.

    Args:
        recipe: that pages begin with.
        num_steps: likewise.
    """

    def __init__(self, recipe: Recipe, num_steps: int) -> None:
        self.controls: dict[tuple[str, str], Any] = {}
        seen = {(knob.key, knob.owner): knob for knob in knobs(recipe, num_steps)}
        for (title, is_open, _), found in zip(GROUPS, grouped(every(num_steps)), strict=True):
            with gr.Accordion(title, open=is_open):
                for knob in found:
                    now = seen.get((knob.key, knob.owner))
                    control = _control(now or knob, visible=now is not None)
                    self.controls[knob.key, knob.owner] = control

    def of(self, session: Session, again: Any = None) -> dict[Any, Any]:
        """Updates of the controls that do not show the recipe of a session yet.

        Args:
            session: of the page.
            again: a control that shows something else, because what it was moved to is refused.
        """
        seen = {(knob.key, knob.owner): knob for knob in knobs(session.recipe, session.num_steps)}
        found, shown = {}, session.shown
        for place, control in self.controls.items():
            knob = seen.get(place)
            if place in shown and shown[place] == knob and control is not again:
                continue
            shown[place] = knob
            if knob is None:
                found[control] = gr.update(visible=False)
                continue
            is_slider = isinstance(control, gr.Slider)
            bounds = {"minimum": knob.low, "maximum": knob.high} if is_slider else {}
            found[control] = gr.update(value=knob.value, visible=True, **bounds)
        return found

    def moved(self, session: Session, place: tuple[str, str]) -> None:
        """A control shows already where it was moved to."""
        found = knobs(session.recipe, session.num_steps)
        knob = next((k for k in found if (k.key, k.owner) == place), None)
        if knob is not None and knob.high == getattr(session.shown.get(place), "high", None):
            session.shown[place] = knob


def _control(knob: Knob, visible: bool) -> Any:
    name = "-".join(part for part in (knob.key.replace(".", "-"), knob.owner) if part)
    common: dict[str, Any] = {
        "label": knob.label,
        "info": knob.says or None,
        "interactive": True,
        "visible": visible,
        "elem_id": f"knob-{name}",
    }
    if knob.kind == "choice":
        return gr.Dropdown([(str(c), c) for c in knob.choices], value=knob.value, **common)
    if knob.kind == "switch":
        return gr.Checkbox(knob.value, **common)
    if knob.kind == "text":
        return gr.Textbox(str(knob.value), max_lines=1, **common)
    whole = knob.kind == "integer"
    if knob.unset:  # the policy finds it, unless somebody says it
        return gr.Number(knob.value, precision=0 if whole else None, **common)
    return gr.Slider(knob.low, knob.high, knob.value, step=1 if whole else FINE, **common)
