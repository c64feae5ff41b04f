"""Granularity: caching only, skipping only, or both, at equal skipped FLOPs."""

import numpy as np
from _study import IDENTICAL, Point, Row, Study, main

COMMON = "power=0,interval=4,forecast=hermite,order=1,min_skip=0,degrade_below=0"
SERIES = {
    "caching only (S_c)": [
        f"flashomni:tau_q={tau},tau_kv=0,{COMMON}" for tau in (0.3, 0.5, 0.7, 0.8, 0.9, 0.97)
    ],
    "skipping only (S_s)": [
        f"flashomni:tau_q=0,tau_kv={tau},{COMMON}" for tau in (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
    ],
    "both": [
        f"flashomni:tau_q={q},tau_kv={kv},{COMMON}"
        for q, kv in ((0.3, 0.01), (0.5, 0.03), (0.7, 0.06), (0.8, 0.1), (0.9, 0.2), (0.97, 0.4))
    ],
    "whole layers (S_q)": [
        f"taylorseer:interval={n},forecast=hermite,layer_order=2" for n in (2, 3, 4, 6, 8)
    ],
}
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


def at_equal_flops(measured: list[tuple[Point, Row]]) -> str:
    """PSNR at given shares of skipped FLOPs, interpolated inside what was measured."""
    lines = [
        "PSNR in dB at equal skipped FLOPs, interpolated linearly between measured points:",
        "",
    ]
    lines += ["| model | series | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    lines += ["|---" * (2 + len(SHARES)) + "|"]
    for key in dict.fromkeys((p.model, p.series) for p, _ in measured):
        curve = sorted(
            (r.flops_skipped, float(r.psnr_db))
            for p, r in measured
            if (p.model, p.series) == key and r.psnr_db != IDENTICAL
        )
        x, y = zip(*curve, strict=True)
        cells = [
            f"{np.interp(share, x, y):.1f}" if x[0] <= share <= x[-1] else "" for share in SHARES
        ]
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


STUDY = Study(
    name="granularity",
    title="Caching, skipping, or both, at equal skipped FLOPs",
    question=(
        "Policy `flashomni` at N = 4 with tau_q alone (feature caching, S_c), tau_kv alone "
        "(block-sparse skipping, S_s) and both, next to whole-layer caching (S_q) with N from 2 "
        "to 8; no mixture of them. Every point sits at its measured share of skipped FLOPs."
    ),
    x_label="share of FLOPs skipped",
    points=[
        Point(series, None, method, model)
        for model in ("tiny-image", "tiny-video")
        for series, methods in SERIES.items()
        for method in methods
    ],
    extra=at_equal_flops,
)

if __name__ == "__main__":
    main(STUDY)
