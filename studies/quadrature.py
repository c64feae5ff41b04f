"""Forecasts without a calibration: does a prior of outputs do what fitted weights do?"""

from _study import Point, Study, main

from flashomni.engine.schedules.interval import Interval

TUNED = "docs/results/tuned/{}/ramp-11-fitted.json"  # by `flashomni tune`, at the models' own sizes
MODELS = ("tiny-image", "tiny-video")
NAMES = ("hermite", "quadrature")


def panel(
    title: str, model: str, computed: tuple[int, ...], of: int = 28, **call: int
) -> list[Point]:
    """Both forecasts on ramps, and on an interval of four; x counts computed steps."""
    steps = {} if of == 28 else {"num_inference_steps": of}
    every = [(count, f"hicache:computed={count},of={of},forecast={{}}") for count in computed]
    last = len(Interval(4).plan(of, 2).computed)
    return [
        *(
            Point(name, count, method.format(name), model, {**steps, **call}, title)
            for name in NAMES
            for count, method in every
        ),
        *(
            Point(
                f"{name}, every 4th",
                last,
                f"hicache:interval=4,warmup=0.16,forecast={name}",
                model,
                {**steps, **call},
                title,
            )
            for name in NAMES
        ),
    ]


def calibrated(model: str) -> list[Point]:
    """Weights that were fitted on this model, and on the other one."""
    other = next(each for each in MODELS if each != model)
    return [
        Point("fitted on this model", 11, TUNED.format(model), model),
        Point("fitted on the other", 11, TUNED.format(other), model),
    ]


STUDY = Study(
    name="quadrature",
    title="Forecasts without a calibration",
    question=(
        "Weights that `flashomni tune` fits to a model are 4 to 7 dB better on the same steps than "
        "Hermite's, because they make good what the forecasts before went wrong by. Forecast "
        "`quadrature` solves for such weights too, with a prior of outputs in place of recordings: "
        "nothing of the model is known to it but the scheduler's noise levels and the steps that "
        "will be computed. Output of the whole model forecast from three anchors, ramps of K steps "
        "and every fourth step."
    ),
    x_label="computed steps",
    points=[
        *panel("tiny-image", "tiny-image", (8, 10, 11, 12, 14)),
        *calibrated("tiny-image"),
        *panel("tiny-video", "tiny-video", (8, 10, 11, 12, 14)),
        *calibrated("tiny-video"),
        *panel("tiny-image, 50 steps", "tiny-image", (12, 18, 25), 50),
        *panel("tiny-image, 64 pixels", "tiny-image", (8, 10, 14), height=64, width=64),
    ],
)

if __name__ == "__main__":
    main(STUDY)
