"""Drift: how far apart may Updates be, and does the length of a video matter?"""

from _study import IDENTICAL, Point, Row, Study, main

INTERVALS = (1, 2, 3, 5, 10)
FRAMES = (17, 33, 65)


def largest(measured: list[tuple[Point, Row]]) -> str:
    """The largest N whose error is within 1 dB of what rounding to bfloat16 does."""
    lines = [
        "| panel | series | PSNR of bfloat16 | largest N within 1 dB of it |",
        "|---|---|---|---|",
    ]
    yardstick = {
        (p.model, p.series.split(",")[0]): r.psnr_db for p, r in measured if p.method == "bfloat16"
    }
    for key in dict.fromkeys((p.model, p.series) for p, _ in measured if p.method != "bfloat16"):
        limit = yardstick[key]
        fits = [
            int(p.x)
            for p, r in measured
            if (p.model, p.series) == key
            and (r.psnr_db == IDENTICAL or float(r.psnr_db) >= float(limit) - 1)
        ]
        lines.append(f"| {key[0]} | {key[1]} | {limit} | {max(fits) if fits else 'none'} |")
    return "\n".join(lines)


def points() -> list[Point]:
    found = []
    places = [("tiny-video", f"{frames} frames", {"num_frames": frames}) for frames in FRAMES]
    for model, series, call in [*places, ("tiny-image", "picture", {})]:
        for interval in INTERVALS:
            found.append(Point(series, interval, f"balanced:interval={interval}", model, call))
        found.append(Point(f"{series}, bfloat16", 1, "bfloat16", model, call))
    return found


STUDY = Study(
    name="drift",
    title="Drift over the interval N, and over the length of a video",
    question=(
        "`balanced` with N steps from one Update to the next, for videos of 17, 33 and 65 frames "
        "and for a picture. N = 1 updates at every step and is exact, so a fixed drop against it "
        "means nothing; the yardstick is what rounding the stock transformer to bfloat16 does."
    ),
    x_label="N",
    points=points(),
    extra=largest,
)

if __name__ == "__main__":
    main(STUDY)
