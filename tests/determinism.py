"""A small pipeline with random weights, recipes of every kind that skip on it, and its pictures."""

import hashlib

import torch

from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.policies import make_policy

STEPS = 12
PROMPTS = ("a large red circle on a green wall", "a small blue square")
BLOCKS = {"block_m": 32, "block_n": 32}
SPARSE = {"interval": 3, "warmup": 0.2, "order": 1, "degrade_below": 0.0, **BLOCKS}
RECIPES = {
    "balanced": Recipe.of("balanced:warmup=.2"),
    "whole layers": Recipe.of("taylorseer:interval=3,warmup=.2"),
    "tiles": Recipe.of(make_policy("topk", q_density=0.5, kv_density=0.6), **SPARSE),
    "flashomni": Recipe.of(make_policy("flashomni", tau_q=0.6, tau_kv=0.3), **SPARSE),
    "key blocks": Recipe.of("spargeattn:mass=.5,interval=3,warmup=.2", **BLOCKS),
    "adaptive": Recipe.of("easycache:threshold=.5,first=3"),
}


def pipeline(device="cpu", dtype=torch.float32, head_dim=32):
    """The same each time, in every process."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=head_dim, dual=1, single=1)
    loaded.pipe.set_progress_bar_config(disable=True)
    return loaded.pipe.to(device, dtype)


def pictures(pipe, seeds=(1,), size=64):
    """fp32 ``[B, 3, H, W]`` in [0, 1], a seed each; noise is drawn on the CPU."""
    prompts = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
    return pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        height=size, width=size, num_inference_steps=STEPS, output_type="pt",
    ).images.float()  # fmt: skip


def digest(pixels):
    """Of every bit."""
    return hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()
