"""Tune a recipe for a pipeline and a number of steps; then a picture with it.

python examples/tune.py --prompts prompts.txt --speedup 2.5 --out recipe.json
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import flashomni
from flashomni.tuning import NotBetterError, Settings

PROMPTS = [
    "a cat",
    "a boat on a lake",
    "a market at night",
    "an old map",
    "two friends",
    "a red door",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--prompts", type=Path, help="a prompt a line; the last are validated on")
    parser.add_argument("--speedup", type=float, default=2.5)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("recipe.json"))
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    prompts = args.prompts.read_text("utf-8").splitlines() if args.prompts else PROMPTS
    call = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}

    recipe: flashomni.Recipe | str = "balanced"
    try:
        found = flashomni.tune(
            pipe,
            prompts,
            call=call,
            target_speedup=args.speedup,
            out=args.out,
            settings=Settings(tries=args.tries),
            on_note=print,
        )
        recipe = found.recipe
    except NotBetterError as error:
        print(f"the preset stays: {error}")
    engine = flashomni.accelerate(pipe, recipe)
    pipe(prompts[0], **call).images[0].save(args.out.with_suffix(".png"))
    print(engine.report())


if __name__ == "__main__":
    main()
