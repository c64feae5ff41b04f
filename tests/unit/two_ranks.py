"""One of two processes that accelerate a model together; each writes what it found as JSON.

``python two_ranks.py RANK STORE OUT``: each rank runs everything alone first, so no files travel.
"""

import copy
import json
import logging
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import (
    ContextParallelConfig,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from torch import nn

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters
from flashomni.policies import make_policy

STEPS = 10
RECIPES = {
    "lossless": Recipe.of("lossless"),
    "ones": Recipe.of(
        make_policy("topk", q_density=1.0, kv_density=1.0), interval=3, warmup=0.0, order=1
    ),
    "topk": Recipe.of(
        make_policy("topk", q_density=0.5, kv_density=0.6), interval=4, warmup=0.2, order=1
    ),
    "topk order 2": Recipe.of(
        make_policy("topk", q_density=0.5, kv_density=0.6), interval=3, warmup=0.2, order=2
    ),
    "flashomni": Recipe.of("flashomni", interval=3, tau_q=0.9, block_m=64, block_n=64),
    "cached by measure": Recipe.of(
        "flashomni", interval=3, tau_q=0.9, degrade_below=0.96, block_m=64, block_n=64
    ),
    "columns": Recipe.of("spargeattn", in_computed=True),
    "balanced": Recipe.of("balanced"),
    "fora": Recipe.of("fora"),
    "taylorseer": Recipe.of("taylorseer"),
    "easycache": Recipe.of("easycache"),
    "svg": Recipe.of("svg"),
}
RECIPES["hold"] = RECIPES["topk"].replace(carry="hold", in_computed=True)
RECIPES["extrapolate"] = RECIPES["hold"].replace(carry="extrapolate", refresh=2)
RECIPES["summaries"] = RECIPES["topk"].replace(summaries=1)
UNEVEN = ("topk", "cached by measure", "svg")
HEADS = ("topk", "columns", "flashomni")
CALLED = ["called topk"]
FLUX2 = ("lossless", "topk", "cached by measure", "taylorseer")
CASES = [
    *RECIPES,
    *(f"flux2 {name}" for name in FLUX2),
    *CALLED,
    *(f"uneven {name}" for name in UNEVEN),
    *(f"3 heads {name}" for name in HEADS),
]
LAYERS = 4


def make(heads=4, text=78, width=19):
    """A small model, and the arguments of a call."""
    torch.manual_seed(0)
    sizes = adapters()["FluxTransformer2DModel"].sizes["tiny"]
    model = FluxTransformer2DModel(**{**sizes, "num_attention_heads": heads}).eval()
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            parameter.data.mul_(2.0)  # attention that is not flat
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(18), torch.arange(width)).float()
    return model, {
        "hidden_states": torch.randn(2, 18 * width, 16),
        "encoder_hidden_states": torch.randn(2, text, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.full((2,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((2,), 3.5),
    }


def make_flux2():
    """FLUX.2, whose position ids diffusers splits with a batch in front."""
    torch.manual_seed(0)
    _, inputs = make()
    sizes = adapters()["Flux2Transformer2DModel"].sizes["tiny"]
    one = torch.arange(1)
    text = torch.cartesian_prod(one, one, one, torch.arange(78)).float()
    image = torch.cartesian_prod(one, torch.arange(18), torch.arange(19), one).float()
    del inputs["pooled_projections"]
    ids = {"img_ids": image.expand(2, -1, -1), "txt_ids": text.expand(2, -1, -1)}
    model = Flux2Transformer2DModel(**{**sizes, "num_attention_heads": 4}).eval()
    return model, {**inputs, **ids}


def generate(model, inputs, engine=None, steps=STEPS):
    """All outputs, the symbols of each layer at each step, and whether O itself is forecast."""
    outputs, symbols, latents, called = [], [], inputs["hidden_states"], False
    for step in range(steps):
        if engine is not None:
            engine.step(step, steps)
        outputs.append(model(**{**inputs, "hidden_states": latents}, return_dict=False)[0])
        latents = latents - 0.05 * outputs[-1]
        if engine is not None:
            symbols.append([cache.chosen for cache in caches(engine)])
            called |= any(not cache.projected and cache.history for cache in caches(engine))
    return torch.stack(outputs), symbols, called


def caches(engine):
    (branch,) = engine._runtime.last.branches.values()
    return branch.layers


def parallel(model, **config):
    config = config or {"ulysses_degree": 2}
    model.enable_parallelism(config=ContextParallelConfig(**config))
    return model


def same_symbols(one, two, rank):
    """Whether this rank has the bits of its heads; and how many were compared."""
    equal, count = True, 0
    for before, after in zip(one, two, strict=True):
        for whole, own in zip(before, after, strict=True):
            if whole is None or own is None:
                equal &= whole is own
                continue
            share, rest = divmod(whole.num_heads, dist.get_world_size())
            start = rank * share + min(rank, rest)
            heads = slice(start, start + own.num_heads)
            equal &= torch.equal(own.q_bits, whole.q_bits[:, heads])
            equal &= torch.equal(own.kv_bits, whole.kv_bits[:, heads])
            count += 1
    return equal, count


def difference(one, two):
    return float((one - two).abs().max())


def equality(rank, model, inputs, many, recipes, prefix=""):
    found = {}
    for name in recipes:
        with flashomni.accelerate(model, RECIPES[name]) as engine:
            one, symbols, _ = generate(model, inputs, engine)
            kinds = layer_kinds(engine.report())
        with flashomni.accelerate(many, RECIPES[name]) as engine:
            two, own, called = generate(many, inputs, engine)
            ranks, report = engine._runtime.sharding.ranks, engine.report()
        spread = [torch.empty_like(two) for _ in range(2)]
        dist.all_gather(spread, two)
        equal, count = same_symbols(symbols, own, rank)
        found[prefix + name] = {
            "difference": difference(one, two),
            "alike": torch.equal(*spread),
            "symbols": equal,
            "compared": count,
            "kinds": kinds == layer_kinds(report),
            "exchanges": ranks.exchanges,
            "gathers": ranks.gathers,
            "bytes": ranks.nbytes,
            "computed": sum(kind != "bypass" for row in kinds for kind in row),
            "updates": sum(kind == "update" for row in kinds for kind in row),
            "rows": kinds,
            "called": called,
            "note": [note for note in report.notes if "all-to-alls" in note],
        }
    return found


def layer_kinds(report):
    """What each layer did in each step, and how often each of it."""
    return [step["layer_kinds"] for step in report.steps]


def refused(act):
    try:
        act()
    except (RuntimeError, ValueError) as refusal:  # NotImplementedError is one of the first
        return f"{type(refusal).__name__}: {refusal}"
    return "accepted"


def refusals(rank):
    model, inputs = make()

    def with_config(recipe="lossless", heads=4, **config):
        flashomni.accelerate(parallel(make(heads)[0], **config), recipe).remove()

    def noise():
        many = parallel(copy.deepcopy(model))
        latents = inputs["hidden_states"] + rank
        with flashomni.accelerate(many, "lossless") as engine:
            generate(many, {**inputs, "hidden_states": latents}, engine, 2)

    def noise_of_one_step():
        many = parallel(copy.deepcopy(model))
        latents = inputs["hidden_states"] + rank
        with flashomni.accelerate(many, "lossless") as engine:
            generate(many, {**inputs, "hidden_states": latents}, engine, 1)

    def within():
        many = copy.deepcopy(model)
        with flashomni.accelerate(many, "lossless") as engine:
            engine.step(0, STEPS)
            many(**inputs)
            parallel(many)
            engine.step(1, STEPS)
            many(**inputs)

    def odd():
        many, arguments = make(text=77)
        with flashomni.accelerate(parallel(many), "lossless") as engine:
            generate(many, arguments, engine, 1)

    def tensor_parallel():
        many = copy.deepcopy(model)
        from diffusers.models._modeling_parallel import ParallelConfig, TensorParallelConfig

        config = TensorParallelConfig(tp_degree=2)
        many._parallel_config = ParallelConfig(tensor_parallel_config=config)
        flashomni.accelerate(many, "lossless")

    def own(name):
        many = adapters()[name].tiny()[0].eval()
        flashomni.accelerate(many, "lossless", ulysses=2).remove()

    def generic():
        many = parallel(copy.deepcopy(model))
        flashomni.accelerate(many, "lossless", blocks=flashomni.Blocks())

    def unified():  # needs four ranks: it is told so, and not run
        many = parallel(copy.deepcopy(model))
        many._parallel_config.context_parallel_config.ring_degree = 2
        flashomni.accelerate(many, "lossless")

    def ids():  # diffusers does not split them with a batch in front
        names = ("img_ids", "txt_ids")
        many, arguments = make()
        arguments |= {name: arguments[name].expand(2, -1, -1) for name in names}
        with flashomni.accelerate(parallel(many), "lossless") as engine:
            generate(many, arguments, engine, 1)

    def root():
        many = adapters()["LTXVideoTransformer3DModel"].tiny()[0].eval()
        flashomni.accelerate(parallel(many), "lossless")

    def twice():
        flashomni.accelerate(parallel(copy.deepcopy(model)), "lossless", ulysses=2)

    def added():
        many = copy.deepcopy(model)
        residuals = [torch.zeros(2, 342, 64)]
        with flashomni.accelerate(many, "lossless", ulysses=2) as engine:
            engine.step(0, STEPS)
            many(**inputs, controlnet_block_samples=residuals)

    def noise_inside():
        latents = inputs["hidden_states"] + rank
        with flashomni.accelerate(copy.deepcopy(model), "lossless", ulysses=2) as engine:
            generate(engine._runtime.model, {**inputs, "hidden_states": latents}, engine, 2)

    def few():
        many, arguments = make(text=1)
        with flashomni.accelerate(many, "lossless", ulysses=2) as engine:
            generate(many, arguments, engine, 1)

    def saved():
        with flashomni.accelerate(parallel(copy.deepcopy(model)), "lossless") as engine:
            generate(engine._runtime.model, inputs, engine, 1)
            engine.save_symbols("never.safetensors")

    recipe = RECIPES["topk"]
    shared = make_policy("topk", q_density=0.5, kv_density=0.6, share_heads=True)
    return {
        "animate": refused(lambda: own("WanAnimateTransformer3DModel")),
        "root": refused(root),
        "twice": refused(twice),
        "added": refused(added),
        "noise inside": refused(noise_inside),
        "few": refused(few),
        "not all": refused(lambda: flashomni.accelerate(copy.deepcopy(model), ulysses=3)),
        "no number": refused(lambda: flashomni.accelerate(copy.deepcopy(model), ulysses=0)),
        "generic": refused(generic),
        "unified": refused(unified),
        "ring": refused(lambda: with_config(ring_degree=2)),
        "heads": refused(lambda: with_config(heads=1)),
        "share_heads": refused(lambda: with_config(recipe.replace(policy=shared))),
        "first_block": refused(lambda: with_config("fbcache")),
        "order": refused(lambda: with_config(recipe.replace(token_order="tile"))),
        "tensor": refused(tensor_parallel),
        "noise": refused(noise),
        "noise of one step": refused(noise_of_one_step),
        "within": refused(within),
        "odd": refused(odd),
        "saved": refused(saved),
        "ids": refused(ids),
    }


def both_orders(model, inputs):
    """Parallelism after accelerate; then taken off: diffusers' own, bit for bit."""
    with flashomni.accelerate(model, "lossless") as engine:
        one, *_ = generate(model, inputs, engine)
    stock, *_ = generate(parallel(copy.deepcopy(model)), inputs)
    many = copy.deepcopy(model)
    engine = flashomni.accelerate(many, "lossless")
    alone, *_ = generate(many, inputs, engine)
    parallel(many)
    two, *_ = generate(many, inputs, engine)
    exchanges = engine._runtime.sharding.ranks.exchanges
    engine.remove()
    after, *_ = generate(many, inputs)
    return {
        "alone": torch.equal(alone, one),
        "difference": difference(one, two),
        "exchanges": exchanges,
        "stock": torch.equal(stock, after),
    }


def called_projection(rank, model, inputs):
    """An output projection that has to be called: the forecast is in front of it."""

    class Called(nn.Linear):
        """As a layer that somebody wrapped."""

    def wrap(module):
        for block in module.single_transformer_blocks:
            block.proj_out.__class__ = Called
        for block in module.transformer_blocks:
            block.attn.to_out[0].__class__ = Called
        return module

    one = wrap(copy.deepcopy(model))
    return equality(rank, one, inputs, parallel(copy.deepcopy(one)), ("topk",), "called ")


def main(rank, store, out):
    import two_ranks_cfg as cfg
    import two_ranks_inside as inside
    import two_ranks_rows as rows

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not torch.accelerator.is_available():
        torch.accelerator.device_count = lambda: 1  # what diffusers divides by
    dist.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=60), world_size=2, rank=rank
    )
    found = {}
    with torch.no_grad():
        found["rows"] = rows.found()
        model, inputs = make()
        found |= equality(rank, model, inputs, parallel(copy.deepcopy(model)), RECIPES)
        found |= called_projection(rank, model, inputs)
        # An odd number of vision tokens is gathered at the end by diffusers, which gloo cannot do.
        uneven, arguments = make(text=77)
        many = parallel(copy.deepcopy(uneven), ulysses_degree=2, ulysses_anything=True)
        found |= equality(rank, uneven, arguments, many, UNEVEN, "uneven ")
        three, arguments = make(heads=3)
        many = parallel(copy.deepcopy(three))
        found |= equality(rank, three, arguments, many, HEADS, "3 heads ")
        model2, arguments = make_flux2()
        many = parallel(copy.deepcopy(model2))
        found |= equality(rank, model2, arguments, many, FLUX2, "flux2 ")
        found["orders"] = both_orders(model, inputs)
        found["refusals"] = refusals(rank)
        found["inside"] = inside.found(rank)
        found["cfg"] = cfg.found(rank)
    Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
