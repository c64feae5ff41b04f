"""tools/pareto.py: planned and unplanned settings are two lines, and all that is drawn is named."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from pareto import LOOKS, drawn, look_of

TAYLOR = "cache-dit:Fn_compute_blocks=1,taylorseer_order=1"


@pytest.mark.parametrize(
    ("method", "look"),
    [
        ("tuned-11", "tuned"), ("ramp-9-fitted", "ramp"), ("balanced", "balanced"),
        ("steps=20", "steps"), ("diffusers.mag:threshold=.12", "diffusers.mag"),
        ("diffusers.mag:steps=[0,1,3]", "diffusers.mag, planned"),
        (f"{TAYLOR},steps=[0,1,3]", "cache-dit, planned"), (f"{TAYLOR},mask=fast", "cache-dit"),
        ("fora", None), ("diffusers.first_block:threshold=.15", None),
    ],
)  # fmt: skip
def test_what_a_method_looks_like(method, look):
    assert look_of(method) == look and (look is None or look in LOOKS)


def test_planned_points_are_joined_to_planned_ones_alone():
    """A line a look; the legend names those that are there, and no others."""
    names = [f"{TAYLOR},steps=[0,1]", f"{TAYLOR},steps=[0,1,2]", f"{TAYLOR},mask=fast", "tuned-9"]
    figure = drawn(
        {"model": "tiny-image", "method": name, "seconds": str(at), "psnr_db": "40",
         "worst_psnr_db": "30"}
        for at, name in enumerate(names)
    )  # fmt: skip
    lines = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert sorted(lines) == [[0.0, 1.0], [2.0], [3.0]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        LOOKS[key][0] for key in ("tuned", "cache-dit, planned", "cache-dit")
    ]
