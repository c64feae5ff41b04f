"""What the studio shows: previews, maps, figures, and text that stays text."""

import dataclasses

import pytest
import torch
from PIL import Image
from studio_parts import STEPS, small

from flashomni.lab import zoo
from flashomni.models import adapters
from flashomni.studio import drawings, pictures
from flashomni.studio.events import Progress
from flashomni.studio.outcome import Ask, Row
from flashomni.studio.preview import Preview
from flashomni.studio.session import Session
from flashomni.studio.shelf import Shelf

pytest_plugins = ["studio_pages"]


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


def wan():
    """A pipeline of videos with Wan's own solver; each of its two parts has random weights."""
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    name = "WanTransformer3DModel"
    sizes = {**adapters()[name].sizes["tiny"], "num_layers": 2}
    sizes |= {"in_channels": 16, "out_channels": 16}
    model = adapters()[name].build("tiny").from_config(sizes).eval()
    parts = {"tokenizer": None, "text_encoder": None, "transformer": model}
    pipe = diffusers.WanPipeline(vae=vae, scheduler=scheduler, **parts)
    text = torch.randn(1, 512, 24, generator=torch.Generator().manual_seed(0))
    pipe.encode_prompt = lambda *args, **kwargs: (text, -text)
    return pipe


def test_a_preview_of_wan_is_where_it_is_heading():
    """Its solver looks back at several steps; the middle frame is shown while others are noise."""
    pipe = wan()
    pipe.scheduler.set_timesteps(6)
    draw = torch.Generator().manual_seed(0)
    end, x = (torch.randn(1, 16, 3, 8, 6, generator=draw) for _ in range(2))
    preview, whole = Preview(pipe, {}), Preview(pipe, {})(0, end)
    noise = x
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        x = pipe.scheduler.step(noise - end, timestep, x, return_dict=False)[0]
        seen = preview(step, x)
        if step:
            gap = torch.tensor(list(seen.tobytes())) - torch.tensor(list(whole.tobytes()))
            assert seen.size == whole.size == (48, 64) and gap.abs().max() <= 2
    assert preview.why_not == ""


@pytest.mark.slow
def test_both_runs_of_wan_are_seen_while_they_go():
    """The dense one too; a video of both is the result."""
    call = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": STEPS}
    loaded = zoo.Loaded(wan(), "a cat", call)
    session = Session(Shelf("cpu", torch.float32, lambda *_: loaded), "wan", "fora:interval=2")
    events = list(session.generate(Ask("a cat", steps=STEPS)))
    seen = {event.stage for event in events if getattr(event, "preview", None) is not None}
    assert {"dense", "accelerated"} <= seen
    outcome = events[-1].value
    assert outcome.dense.pixels.shape == outcome.accelerated.shape == (9, 3, 64, 48)
    assert outcome.note == "" and outcome.summary.flops_skipped > 0.1
    session.close()


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
