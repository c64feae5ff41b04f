"""Text protection: what happens to the prompt if text keys may be skipped like any other?"""

from _study import Point, Study, main

FLASHOMNI = "flashomni:tau_q=0,tau_kv={},power=0,interval=4,min_skip=0,protect_text={}"
SPARGE = "spargeattn:mass={},interval=4,protect_text={}"
TAU_KV = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)

STUDY = Study(
    name="text_protection",
    title="Text protection on and off",
    question=(
        "Skipping of key blocks with text protected (text keys are always visited; with "
        "`flashomni` text rows visit everything) and without, over the share of attention mass "
        "that may be skipped. A prompt that is lost shows in the statements, not in PSNR."
    ),
    x_label="share of attention mass that may be skipped",
    points=[
        Point(f"{policy}, text {state}", mass, method.format(value, protect), model)
        for model in ("tiny-image", "tiny-video")
        for policy, method in (("flashomni", FLASHOMNI), ("spargeattn", SPARGE))
        for state, protect in (("protected", "true"), ("not protected", "false"))
        for mass in TAU_KV
        for value in (mass if policy == "flashomni" else round(1 - mass, 3),)
    ],
)

if __name__ == "__main__":
    main(STUDY)
