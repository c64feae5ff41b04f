"""What two processes find where blocks alone see a share of the sequence; see `two_ranks.py`."""

import copy

import torch
import two_ranks as other
from diffusers import ContextParallelConfig
from recorder import TapeRecorder

import flashomni
from flashomni.models import adapters

STEPS = 6
ALONE = (  # whose blocks need more than a share of their tokens
    "LTX2VideoTransformer3DModel", "SkyReelsV2Transformer3DModel", "WanAnimateTransformer3DModel",
    "WanVACETransformer3DModel",
)  # fmt: skip
ADAPTERS = sorted(set(adapters()) - set(ALONE))
MORE = {
    "HunyuanVideoTransformer3DModel": ("balanced", "tile", "hold", "taylorseer"),
    "QwenImageTransformer2DModel": ("cached by measure", "tile", "columns"),
    "WanTransformer3DModel": ("cached by measure", "tile", "summaries"),  # by a map of the text
    "ZImageTransformer2DModel": ("flashomni", "tile"),
    "SD3Transformer2DModel": ("cached by measure",),
}
RECIPES = {**other.RECIPES, "tile": other.RECIPES["topk"].replace(token_order="tile")}
CASES = [(name, recipe) for name in ADAPTERS for recipe in ("topk", *MORE.get(name, ()))]
GRAPHS = ("lossless", "topk", "cached by measure", "hold", "fora")
PLANS = ("QwenImageTransformer2DModel", "WanTransformer3DModel")


def generate(model, inputs, latents, engine=None, steps=STEPS):
    outputs, symbols = [], []
    for step in range(steps):
        if engine is not None:
            engine.step(step, steps)
        now = {**inputs, latents: inputs[latents] * (1 - 0.03 * step)}
        output = model(**now, return_dict=False)[0]
        outputs.append(torch.stack(list(output)))
        if engine is not None:
            symbols.append([cache.chosen for cache in other.caches(engine)])
    return torch.stack(outputs), symbols


def equality(rank, model, inputs, latents, recipe):
    with flashomni.accelerate(model, RECIPES[recipe]) as engine:
        one, symbols = generate(model, inputs, latents, engine)
        kinds = other.layer_kinds(engine.report())
    with flashomni.accelerate(model, RECIPES[recipe], ulysses=2) as engine:
        two, own = generate(model, inputs, latents, engine)
        found, ranks = engine.report(), engine._runtime.sharding.ranks
    equal, count = other.same_symbols(symbols, own, rank)
    spread = [torch.empty_like(two) for _ in range(2)]
    torch.distributed.all_gather(spread, two)
    return {
        "difference": other.difference(one, two) / max(1.0, float(one.abs().max())),
        "alike": torch.equal(*spread),
        "symbols": equal,
        "compared": count,
        "kinds": kinds == other.layer_kinds(found),
        "exchanges": ranks.exchanges,
        "computed": sum(kind != "bypass" for row in kinds for kind in row),
    }


def recorded(recipe):
    """Three generations and one of another picture, computed and then as recordings."""
    torch.manual_seed(0)
    model, inputs = other.make()
    other_inputs = {**inputs, "hidden_states": inputs["hidden_states"].flip(0)}
    found = []
    for graphs in (False, True):
        how = {"graphs": graphs, "backend": "reference", "ulysses": 2}
        with flashomni.accelerate(model, RECIPES[recipe], **how) as engine:
            kept = engine._runtime.graphs
            kept._recorder_for = lambda device: TapeRecorder()
            outs, counts = [], []
            for each in (inputs, inputs, inputs, other_inputs):
                before = kept.replays
                outs.append(generate(model, each, "hidden_states", engine)[0])
                counts.append(engine._runtime.sharding.ranks.counts)
            replays, notes = kept.replays - before, engine.report().notes
        found.append((outs, counts))
    (plain, sent), (graphed, replayed) = found
    return {
        "bits": [torch.equal(a, b) for a, b in zip(plain, graphed, strict=True)],
        "differ": not torch.equal(plain[0], plain[-1]),
        "sent": sent,
        "replayed": replayed,
        "replays": replays,
        "notes": [note for note in notes if "CUDA graphs" in note],
    }


def per_token(rank):
    """What has an entry for each token: the timesteps of Wan's TI2V, Qwen's modulation."""
    wan, inputs = adapters()["WanTransformer3DModel"].tiny()
    steps = torch.linspace(0, 999, 5 * 9 * 7).expand(2, -1)
    found = {"wan": equality(rank, wan.eval(), {**inputs, "timestep": steps}, "hidden_states",
                             "topk")}  # fmt: skip
    sizes = adapters()["QwenImageTransformer2DModel"].sizes["tiny"]
    torch.manual_seed(0)
    from diffusers import QwenImageTransformer2DModel

    qwen = QwenImageTransformer2DModel(**sizes, zero_cond_t=True).eval()
    _, inputs = adapters()["QwenImageTransformer2DModel"].tiny()
    inputs["img_shapes"] = [[(1, 9, 19), (1, 9, 19)]] * 2
    found["qwen"] = equality(rank, qwen, inputs, "hidden_states", "tile")
    return found


def plans(name):
    """diffusers' plan is put aside while the engine is on, whichever came first."""
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    sizes = {**adapters()[name].sizes["tiny"], "num_attention_heads": 4}
    model = type(model)(**sizes).eval()
    inputs = {key: x for key, x in inputs.items() if "mask" not in key}
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :76]
    if inputs["hidden_states"].ndim == 5:  # what diffusers splits has to divide
        inputs["hidden_states"] = inputs["hidden_states"][:, :, :4]
    with flashomni.accelerate(model, RECIPES["topk"]) as engine:
        one, _ = generate(model, inputs, "hidden_states", engine)
    theirs = other.parallel(copy.deepcopy(model))
    stock, _ = generate(theirs, inputs, "hidden_states", None, 2)
    with flashomni.accelerate(theirs, RECIPES["topk"]) as engine:
        before, _ = generate(theirs, inputs, "hidden_states", engine)
    many = copy.deepcopy(model)
    engine = flashomni.accelerate(many, RECIPES["topk"])
    alone, _ = generate(many, inputs, "hidden_states", engine)
    many.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    after, _ = generate(many, inputs, "hidden_states", engine)
    exchanges = engine._runtime.sharding.ranks.exchanges
    engine.remove()
    return {
        "alone": torch.equal(alone, one),
        "before": other.difference(before, one),
        "after": other.difference(after, one),
        "exchanges": exchanges,
        "stock": all(
            torch.equal(generate(each, inputs, "hidden_states", None, 2)[0], stock)
            for each in (theirs, many)
        ),
    }


def found(rank):
    result = {"graphs": {recipe: recorded(recipe) for recipe in GRAPHS}}
    for name, adapter in adapters().items():
        if name in ADAPTERS:
            torch.manual_seed(0)
            model, inputs = adapter.tiny()
            for recipe in ("topk", *MORE.get(name, ())):
                result[f"{name} {recipe}"] = equality(
                    rank, model.eval(), inputs, adapter.latents, recipe
                )
    result |= per_token(rank)
    return {**result, "plans": {name: plans(name) for name in PLANS}}
