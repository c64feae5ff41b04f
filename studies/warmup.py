"""Warm-up: how many dense steps first, and how far apart the Updates after them?"""

from _study import Point, Study, main

WARMUPS = (0.1, 0.16, 0.25, 0.35, 0.45)
INTERVALS = (3, 4, 5, 6, 8, 10)
RECIPE = "taylorseer:forecast=hermite,layer_order=2,warmup={},interval={}"

STUDY = Study(
    name="warmup",
    title="Dense steps first, or Updates closer together?",
    question=(
        "Whole-layer caching (Hermite forecast of order 2) with a share of dense steps at first "
        "and N from 3 to 10 after them. Every point sits at its measured share of skipped FLOPs: "
        "the highest line at a place is the best way to spend them. The presets come from here."
    ),
    x_label="share of FLOPs skipped",
    points=[
        Point(f"warm-up {warmup:.0%}", None, RECIPE.format(warmup, interval), model)
        for model in ("tiny-image", "tiny-video")
        for warmup in WARMUPS
        for interval in (INTERVALS if model == "tiny-image" else (3, 5, 8))
    ],
)

if __name__ == "__main__":
    main(STUDY)
