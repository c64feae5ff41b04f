"""Forecasts without a calibration: does a prior of outputs do what fitted weights do?"""

from _study import Point, Study, main

TUNED = "docs/results/tuned/{}/ramp-11-fitted.json"  # by `flashomni tune`, of either model
NAMES = ("hermite", "quadrature")
RAMP = "hicache:computed={},of=28,forecast={}"
EVERY = "hicache:interval=4,warmup=0.16,forecast={}"

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
        *(
            Point(name, count, RAMP.format(count, name))
            for name in NAMES
            for count in (8, 10, 11, 12, 14)
        ),
        *(Point(f"{name}, every 4th", 11, EVERY.format(name)) for name in NAMES),
        Point("fitted on pictures", 11, TUNED.format("tiny-image")),
        Point("fitted on videos", 11, TUNED.format("tiny-video")),
    ],
)

if __name__ == "__main__":
    main(STUDY)
