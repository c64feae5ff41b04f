"""Wan 2.1 and 2.2: a video. Wan 2.2 has two transformers, each with a recipe over its own steps.

python examples/wan.py "a boat on a lake" --recipe balanced
python examples/wan.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --recipe quality --low-noise fast
"""

import argparse

import torch
from diffusers import WanPipeline

import flashomni


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a boat on a lake")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--low-noise", help="of the second transformer; the same if left out")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--out", default="wan.gif")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)

    recipe = args.recipe
    if args.low_noise:
        recipe = {"transformer": args.recipe, "transformer_2": args.low_noise}
    engine = flashomni.accelerate(pipe, recipe)
    frames = pipe(
        args.prompt,
        num_inference_steps=args.steps,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        output_type="pil",
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=62)
    print(engine.report())


if __name__ == "__main__":
    main()
