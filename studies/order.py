"""Order: does a forecast of order D = 0, 1, 2 pay, and in which basis?"""

from _study import Point, Study, main

TILES = "flashomni:tau_q=0.9,tau_kv=0,power=0,interval=4,degrade_below=0"
LAYERS = "taylorseer:interval=4"
SERIES = {
    "tiles, taylor": TILES + ",forecast=taylor,order={}",
    "tiles, hermite": TILES + ",forecast=hermite,order={}",
    "layers, taylor": LAYERS + ",forecast=taylor,layer_order={}",
    "layers, hermite": LAYERS + ",forecast=hermite,layer_order={}",
}

STUDY = Study(
    name="order",
    title="Order of the forecast",
    question=(
        "Forecasts of order D = 0, 1, 2 (3 for whole layers) at N = 4, for cached tiles (S_c) and "
        "for layers that are cached whole; Taylor series against contracted Hermite polynomials."
    ),
    x_label="order D",
    points=[
        Point(series, order, method.format(order), model)
        for model in ("tiny-image", "tiny-video")
        for series, method in SERIES.items()
        for order in ((0, 1, 2, 3) if series.startswith("layers") else (0, 1, 2))
    ],
)

if __name__ == "__main__":
    main(STUDY)
