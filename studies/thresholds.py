"""Thresholds: how much may be cached (tau_q) or skipped (tau_kv) before text agreement breaks?"""

from _study import Point, Study, main

COMMON = "power=0,interval=4,forecast=hermite,order=1,min_skip=0,degrade_below=0"
TAU_KV = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TAU_Q = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0)

STUDY = Study(
    name="thresholds",
    title="Sensitivity to tau_q and tau_kv",
    question=(
        "Policy `flashomni` with one threshold at a time and N = 4: tau_q is the share of text "
        "coupling that may be cached (the rest is exact), tau_kv the share of each row's pooled "
        "attention that may be skipped. No layer is cached whole. Where does text agreement break?"
    ),
    x_label="threshold",
    points=[
        Point(name, value, f"flashomni:{method},{COMMON}", model)
        for model in ("tiny-image", "tiny-video")
        for name, values, setting in (
            ("tau_kv (skipping)", TAU_KV, "tau_q=0,tau_kv={}"),
            ("tau_q (caching)", TAU_Q, "tau_q={},tau_kv=0"),
        )
        for value in values
        for method in (setting.format(value),)
    ],
)

if __name__ == "__main__":
    main(STUDY)
