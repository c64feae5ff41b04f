"""FLUX.1: one picture as diffusers makes it, one accelerated, and what was saved.

python examples/flux.py "a cat holding a sign" --recipe balanced
"""

import argparse
import time

import torch
from diffusers import FluxPipeline

import flashomni


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a cat holding a sign")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = FluxPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)

    def generate(path: str) -> float:
        start = time.perf_counter()
        pipe(
            args.prompt,
            num_inference_steps=args.steps,
            height=args.size,
            width=args.size,
            generator=torch.Generator().manual_seed(0),
        ).images[0].save(path)
        return time.perf_counter() - start

    generate("stock.png")  # the first generation of either loads and builds kernels
    stock = generate("stock.png")
    with flashomni.accelerate(pipe, args.recipe) as engine:
        generate("accelerated.png")
        accelerated = generate("accelerated.png")
        print(engine.report())
    print(f"stock {stock:.1f} s, accelerated {accelerated:.1f} s: {stock / accelerated:.2f}x")


if __name__ == "__main__":
    main()
