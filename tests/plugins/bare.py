"""``python bare.py FOLDER DTYPE pil|pt [GUIDANCE]``: the pictures that a server has to make."""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from servers import MODEL, PROMPT, RECIPE, SEED, SIDE, STEPS

from flashomni import accelerate

folder, dtype, kind, *guidance = sys.argv[1:]
call = {"guidance_scale": float(guidance[0])} if guidance and guidance[0] else {}
pipe = DiffusionPipeline.from_pretrained(MODEL, torch_dtype=getattr(torch, dtype))


def save(name: str) -> None:
    noise = torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        image = pipe(PROMPT, num_inference_steps=STEPS, height=SIDE, width=SIDE, generator=noise,
                     output_type=kind, **call).images[0]  # fmt: skip
    if kind == "pt":  # as SGLang makes bytes of it
        levels = (image.float().clamp(0, 1) * 255).to(torch.uint8)
        image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    image.save(Path(folder) / f"{name}.png")


save("dense")
accelerate(pipe, RECIPE)
save(RECIPE)
