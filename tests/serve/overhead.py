"""What a server adds to a picture: `python tests/serve/overhead.py`, in an environment with Ray.

The bare pipeline in this process and a server with one replica take turns, with one thread each,
the same recipe, size and seed, and as many steps as make about `--seconds` a picture. Prints
medians: the bare call, the request over HTTP, the call inside the replica, and what the request
took besides it.
"""

import argparse
import statistics
import time

import torch
from server import PROMPT, Server, pixels

import flashomni
from flashomni.lab import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="instead of --seconds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--size", default="128x128")
    args = parser.parse_args()

    torch.set_num_threads(1)
    width, height = map(int, args.size.split("x"))
    loaded = zoo.load("tiny-image")
    loaded.pipe.set_progress_bar_config(disable=True)
    flashomni.accelerate(loaded.pipe, args.recipe)

    def bare(steps: int) -> tuple[float, bytes]:
        call = {**loaded.call, "width": width, "height": height, "num_inference_steps": steps}
        noise = torch.Generator("cpu").manual_seed(1)
        start = time.perf_counter()
        image = loaded.pipe(PROMPT, **call, generator=noise).images[0]
        return time.perf_counter() - start, image.tobytes()

    bare(10)
    fast = min(bare(10)[0] for _ in range(3)) / 10
    steps = args.steps or max(round(args.seconds / fast), 1)
    rows = []
    with Server(recipe=args.recipe) as server:
        body = {"size": args.size, "num_inference_steps": steps}
        server.post(**body)
        for _ in range(args.rounds):
            alone, picture = bare(steps)
            start = time.perf_counter()
            status, reply = server.post(**body)
            whole = time.perf_counter() - start
            assert status == 200 and pixels(reply) == picture, reply
            inside = reply["flashomni"][0]["seconds"]
            rows.append((alone, whole, inside, whole - inside, (whole - inside) / inside))
    columns = zip(*rows, strict=True)
    alone, whole, inside, added, share = (statistics.median(column) for column in columns)
    least, most = (pick(row[3] for row in rows) * 1e3 for pick in (min, max))
    print(
        f"{args.size}, {steps} steps, recipe {args.recipe}, {args.rounds} rounds: "
        f"bare {alone:.3f} s, over HTTP {whole:.3f} s, of it the pipeline {inside:.3f} s; "
        f"besides {added * 1e3:.1f} ms ({least:.1f} to {most:.1f}), {share:.2%}"
    )


if __name__ == "__main__":
    main()
