"""HunyuanVideo: a video, in as little of the card's memory as is wanted.

python examples/hunyuan_video.py "a boat on a lake" --offload
"""

import argparse

import torch
from diffusers import HunyuanVideoPipeline

import flashomni


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="a boat on a lake")
    parser.add_argument("--model", default="hunyuanvideo-community/HunyuanVideo")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--offload", action="store_true", help="models to the card in turn")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--out", default="hunyuan.gif")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = HunyuanVideoPipeline.from_pretrained(args.model, torch_dtype=dtype)
    pipe.vae.enable_tiling()
    if args.offload and device == "cuda":
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)

    where = "host" if args.offload else "compute"  # where histories of tiles are kept
    engine = flashomni.accelerate(pipe, args.recipe, history_device=where)
    frames = pipe(
        args.prompt,
        num_inference_steps=args.steps,
        height=args.height,
        width=args.width,
        num_frames=args.frames,
        output_type="pil",
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=42)
    print(engine.report())


if __name__ == "__main__":
    main()
