"""Qwen-Image: true CFG calls the transformer twice a step; part of the second calls are left out.

python examples/qwen_image.py "a coffee shop with a sign" --delta-every 2
"""

import argparse

import torch
from diffusers import QwenImagePipeline

import flashomni


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a coffee shop with a sign")
    parser.add_argument("--model", default="Qwen/Qwen-Image")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--delta-every", type=int, default=1, help="1 computes every second call")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=1328)
    parser.add_argument("--out", default="qwen.png")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = QwenImagePipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)

    # From half of the generation on the unconditional branch runs in every N-th computed step.
    engine = flashomni.accelerate(pipe, args.recipe, delta_every=args.delta_every, delta_after=0.5)
    image = pipe(
        args.prompt,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=args.steps,
        height=args.size,
        width=args.size,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(args.out)
    print(engine.report())


if __name__ == "__main__":
    main()
