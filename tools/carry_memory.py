"""What carry takes of a card: peaks and steps of preset video, without carry, with it, on the host.

``python tools/carry_memory.py``: HunyuanVideo of real width with fewer blocks and random weights,
32,656 tokens; one activation ``[tokens, hidden]`` is the unit. Whatever does not depend on the
number of blocks (a layer's activations, what is under way, histories of whole layers) is as in the
whole model; D on the card is not. ``--device cpu`` is a try on a small model, without memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import flashomni
from flashomni.models import adapters

WAYS = {
    "lossless": "lossless",
    "video without carry": "video:min_steps=0,carry=off",
    "video, D on the device": "video:min_steps=0,history_device=compute",
    "video": "video:min_steps=0",
}
CLASS = "HunyuanVideoTransformer3DModel"


def make(device: torch.device, blocks: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with random weights, and its inputs; a small one on a CPU."""
    import diffusers

    on_card = device.type == "cuda"
    dtype = torch.bfloat16 if on_card else torch.float32
    sizes: dict[str, Any] = dict(adapters()[CLASS].sizes["published" if on_card else "tiny"])
    latents, text = (16, 9, 90, 160) if on_card else (4, 2, 24, 32), 256 if on_card else 20
    if on_card:
        sizes |= {"num_layers": blocks, "num_single_layers": blocks}
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = getattr(diffusers, CLASS)(**sizes).eval()
    torch.set_default_dtype(torch.float32)
    given: dict[str, Any] = {"device": device, "dtype": dtype}
    return model, {
        "hidden_states": torch.randn(1, *latents, **given),
        "timestep": torch.full((1,), 500.0, **given),
        "encoder_hidden_states": torch.randn(1, text, sizes["text_embed_dim"], **given),
        "encoder_attention_mask": (torch.arange(text, device=device) < text * 4 // 5).long()[None],
        "pooled_projections": torch.randn(1, sizes["pooled_projection_dim"], **given),
        "guidance": torch.full((1,), 6000.0, **given),
    }


def run(model: nn.Module, inputs: dict[str, Tensor], recipe: str, steps: int) -> dict[str, Any]:
    """One generation: latents, peak in bytes, and milliseconds by kind of step."""
    x, times, on_card = inputs["hidden_states"], [], inputs["hidden_states"].is_cuda
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with flashomni.accelerate(model, recipe, graphs=False) as engine:
        for step in range(steps):
            engine.step(step, steps)
            begin = time.perf_counter()
            x = x - 0.05 * model(**inputs | {"hidden_states": x}, return_dict=False)[0]
            if on_card:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        report = engine.report()
    by_kind: dict[str, list[float]] = {}
    for step, spent in zip(report.steps, times, strict=True):
        by_kind.setdefault(" ".join((step["kind"], *step["does"])), []).append(spent)
    return {
        "latents": x,
        "peak": torch.cuda.max_memory_allocated() if on_card else 0,
        "ms": {kind: statistics.median(each) for kind, each in by_kind.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--blocks", default=4, type=int, help="of each of the two kinds")
    parser.add_argument("--steps", default=28, type=int)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model, inputs = make(arguments.device, arguments.blocks)
    frames, height, width = inputs["hidden_states"].shape[2:]
    tokens = frames * height * width // 4 + inputs["encoder_hidden_states"].shape[1]
    hidden = model.config.num_attention_heads * model.config.attention_head_dim
    weights = sum(p.nbytes for p in model.parameters())
    unit = tokens * hidden * next(model.parameters()).element_size()
    print(f"{tokens} tokens, one activation {unit / 2**30:.3f} GiB, weights {weights / 2**30:.2f}")
    for recipe in WAYS.values():
        run(model, inputs, recipe, min(3, arguments.steps))  # compiles
    found = {}
    for name, recipe in WAYS.items():
        # A step of lossless is like any other; a plan of eleven computed steps is not.
        steps = min(4, arguments.steps) if name == "lossless" else arguments.steps
        found[name] = run(model, inputs, recipe, steps)
        peak = found[name]["peak"]
        spent = "; ".join(f"{kind} {ms:.1f} ms" for kind, ms in found[name]["ms"].items())
        beside = max(peak - weights, 0)
        print(f"{name}: {peak / 2**30:.3f} GiB, {beside / unit:.1f} activations; {spent}")
    beside = found["video"]["peak"] - found["video without carry"]["peak"]
    print(f"carry on the host: {beside / 2**30:.3f} GiB, {beside / unit:.1f} activations")
    here, there = (found[name]["latents"] for name in ("video, D on the device", "video"))
    print(f"the same bits as with D on the device: {torch.equal(here, there)}")


if __name__ == "__main__":
    main()
