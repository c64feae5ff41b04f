"""One of two processes, a card each: bf16 on two cards against one, for every adapter that can.

``python two_cards.py RANK STORE OUT [SECONDS]``: each rank runs everything alone first.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters

STEPS = 5
FIRST = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel", "QwenImageTransformer2DModel",
         "WanTransformer3DModel", "SD3Transformer2DModel", "ZImageTransformer2DModel")  # fmt: skip
TOPK = Recipe.of("topk", q_density=0.5, kv_density=0.6, interval=3, warmup=0.2, order=1)


def generate(model, inputs, latents, engine=None):
    outputs = []
    for step in range(STEPS):
        if engine is not None:
            engine.step(step, STEPS)
        now = {**inputs, latents: inputs[latents] * (1 - 0.03 * step)}
        outputs.append(torch.stack(list(model(**now, return_dict=False)[0])).float())
    return torch.stack(outputs)


def on(device, dtype, inputs):
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in inputs.items()
    }


def error(x, reference):
    return float((x - reference).norm() / reference.norm())


def compare(adapter, device):
    """Errors against fp32 of stock bf16 and of two cards, lossless; then of topk, two to one."""
    torch.manual_seed(0)
    model, inputs = adapter.tiny()
    model, latents = model.eval().to(device), adapter.latents
    exact = generate(model, on(device, torch.float32, inputs), latents)
    model, inputs = model.to(torch.bfloat16), on(device, torch.bfloat16, inputs)
    stock, found = generate(model, inputs, latents), {}
    for name, recipe in (("lossless", "lossless"), ("topk", TOPK)):
        with flashomni.accelerate(model, recipe, graphs=False) as engine:
            one = generate(model, inputs, latents, engine)
        with flashomni.accelerate(model, recipe, ulysses=dist.get_world_size()) as engine:
            two = generate(model, inputs, latents, engine)
        spread = [torch.empty_like(two) for _ in range(dist.get_world_size())]
        dist.all_gather(spread, two)
        found[name] = {
            "torch": error(stock, exact),
            "one": error(one, exact),
            "two": error(two, exact),
            "between": error(two, one),
            "alike": all(torch.equal(x, spread[0]) for x in spread),
        }
    return found


def main(rank, store, out, seconds=150.0):
    start, device = time.monotonic(), torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", f"file://{store}", timedelta(seconds=60), world_size=2, rank=rank, device_id=device
    )
    names = [*FIRST, *(name for name in sorted(adapters()) if name not in FIRST)]
    found = {}
    with torch.no_grad():
        for name in names:
            late = torch.tensor(time.monotonic() - start > seconds, device=device).float()
            dist.all_reduce(late)
            adapter = adapters()[name]
            if late or not all(site.sequence for site in adapter.sites(adapter.tiny()[0])):
                continue
            try:
                found[name] = compare(adapter, device)
            except Exception as error:  # both ranks fail alike, or the next collective ends them
                found[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], *map(float, sys.argv[4:]))
