"""Transfer: one recipe, unchanged, on a picture model and on a video model."""

from _study import Point, Row, Study, main

RECIPES = (
    "quality", "balanced", "fast",
    "fora:interval=2", "fora:interval=3", "fora:interval=4",
    "taylorseer:interval=2", "taylorseer:interval=3", "taylorseer:interval=4",
    "flashomni:tau_q=0.9,tau_kv=0,power=0,interval=4",
    "flashomni:tau_q=0.5,tau_kv=0.15,power=2,interval=4",
    "flashomni:tau_q=0,tau_kv=0.1,power=0,interval=4",
    "spargeattn:mass=0.99", "spargeattn:mass=0.95", "topk:q_density=1,kv_density=0.5,interval=4",
    "window", "steps=20", "steps=14", "steps=10",
)  # fmt: skip


def side_by_side(measured: list[tuple[Point, Row]]) -> str:
    """PSNR of each recipe on both models, ranked on the first, and the rank correlation."""
    from scipy.stats import spearmanr

    found: dict[str, dict[str, Row]] = {}
    for point, row in measured:
        found.setdefault(point.method, {})[point.model] = row
    lines = ["| recipe | tiny-image, dB | tiny-video, dB | FLOPs skipped |", "|---|---|---|---|"]
    ranked = sorted(found.items(), key=lambda item: -float(item[1]["tiny-image"].psnr_db))
    for name, rows in ranked:
        image, video = rows["tiny-image"], rows["tiny-video"]
        lines.append(
            f"| `{name}` | {image.psnr_db} | {video.psnr_db} | "
            f"{image.flops_skipped:.0%} / {video.flops_skipped:.0%} |"
        )
    pairs = [[float(r[m].psnr_db) for m in ("tiny-image", "tiny-video")] for _, r in ranked]
    lines += ["", f"Rank correlation of the two columns: {spearmanr(pairs).statistic:.2f}."]
    return "\n".join(lines)


STUDY = Study(
    name="transfer",
    title="Transfer of a recipe between models",
    question=(
        "The same recipes, unchanged, on tiny-image (FLUX: text first) and tiny-video "
        "(HunyuanVideo: text last, padded). Does the order among them hold?"
    ),
    x_label="share of FLOPs skipped",
    points=[
        Point(model, None, method, model, panel="all recipes")
        for model in ("tiny-image", "tiny-video")
        for method in RECIPES
    ],
    extra=side_by_side,
)

if __name__ == "__main__":
    main(STUDY)
