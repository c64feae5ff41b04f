"""One of several processes, a card each: bf16 on several cards against one, model by model.

``python two_cards.py RANK STORE OUT``: each rank runs everything alone first. Two ranks share the
tokens of every model that can be shared, and then the branches of those that are called once a
branch; four do both at once. Without CUDA it runs on CPUs, with gloo.
"""

import argparse
import json
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
BRANCHES = ("QwenImageTransformer2DModel", "WanTransformer3DModel")  # called for one after another
RECIPES = {
    "lossless": Recipe.of("lossless"),
    "topk": Recipe.of("topk", q_density=0.5, kv_density=0.6, interval=3, warmup=0.2, order=1),
}


def generate(model, inputs, latents, engine=None):
    outputs = []
    for step in range(STEPS):
        if engine is not None:
            engine.step(step, STEPS)
        now = {**inputs, latents: inputs[latents] * (1 - 0.03 * step)}
        outputs.append(torch.stack(list(model(**now, return_dict=False)[0])).float())
    return torch.stack(outputs)


def guided(model, inputs, latents, engine=None):
    """Latents of all steps with true CFG, of two texts."""
    text = inputs["encoder_hidden_states"]
    x, found = inputs[latents], []
    for step in range(STEPS):
        outputs = []
        for branch, words in (("cond", text), ("uncond", text.flip(1))):
            if engine is not None:
                engine.step(step, STEPS, branch)
            now = {**inputs, latents: x, "encoder_hidden_states": words}
            outputs.append(model(**now, return_dict=False)[0])
        x = x - 0.02 * (outputs[1] + 3.0 * (outputs[0] - outputs[1]))
        found.append(x.float())
    return torch.stack(found)


def on(device, dtype, inputs):
    return {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in inputs.items()
    }


def error(x, reference):
    return float((x - reference).norm() / reference.norm())


def compare(adapter, device, run=generate, **ranks):
    """Errors against fp32 of stock bf16, of one card and of several; and of several to one."""
    torch.manual_seed(0)
    model, inputs = adapter.tiny()
    model, latents = model.eval().to(device), adapter.latents
    exact = run(model, on(device, torch.float32, inputs), latents)
    model, inputs = model.to(torch.bfloat16), on(device, torch.bfloat16, inputs)
    stock, found = run(model, inputs, latents), {}
    for name, recipe in RECIPES.items():
        with flashomni.accelerate(model, recipe, graphs=False) as engine:
            one = run(model, inputs, latents, engine)
        with flashomni.accelerate(model, recipe, graphs=False, **ranks) as engine:
            two = run(model, inputs, latents, engine)
        with flashomni.accelerate(model, recipe, graphs=True, **ranks) as engine:
            graphed = [run(model, inputs, latents, engine) for _ in range(3)]
            replays, notes = engine._runtime.graphs.replays, engine.report().notes
        spread = [torch.empty_like(two) for _ in range(dist.get_world_size())]
        dist.all_gather(spread, two)
        found[name] = {
            "torch": error(stock, exact),
            "one": error(one, exact),
            "two": error(two, exact),
            "between": error(two, one),
            "graphs": all(torch.equal(x, two) for x in graphed),
            "replays": replays,
            "why": [note for note in notes if "no CUDA graphs" in note],
            "alike": all(torch.equal(x, spread[0]) for x in spread),
        }
    return found


def jobs(size):
    """What to compare, the most used first: its name, the model's, and how it is shared out."""
    if size == 4:
        return [(f"{name} cfg=2 ulysses=2", name, {"run": guided, "cfg": 2, "ulysses": 2})
                for name in BRANCHES]  # fmt: skip
    rest = sorted(set(adapters()) - set(FIRST))
    shared = [
        name
        for name in (*FIRST, *rest)
        if all(site.sequence for site in adapters()[name].sites(adapters()[name].tiny()[0]))
    ]
    found = [(name, name, {"ulysses": size}) for name in shared]
    cfg = [(f"{name} cfg=2", name, {"run": guided, "cfg": 2}) for name in BRANCHES]
    return [*found[: len(FIRST)], *cfg, *found[len(FIRST) :]]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=2, help="ranks: 2 or 4")
    parser.add_argument("--seconds", type=float, default=300.0, help="no job begins after these")
    parser.add_argument("--share", type=int, default=0, help="which jobs")
    parser.add_argument("--of", type=int, default=1, help="how many shares there are")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", asked.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        f"file://{asked.store}",
        timedelta(seconds=120),
        world_size=asked.size,
        rank=asked.rank,
        device_id=device if device.type == "cuda" else None,
    )
    device = device if device.type == "cuda" else torch.device("cpu")
    start, found = time.monotonic(), {}
    with torch.no_grad():
        for name, model, how in jobs(asked.size)[asked.share :: asked.of]:
            late = torch.tensor(float(time.monotonic() - start > asked.seconds), device=device)
            dist.all_reduce(late)
            if late:
                continue
            try:
                found[name] = compare(adapters()[model], device, **how)
            except Exception as problem:  # both ranks fail alike, or the next collective ends them
                found[name] = {"error": f"{type(problem).__name__}: {problem}"}
            asked.out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
