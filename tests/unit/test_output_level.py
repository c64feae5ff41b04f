"""The output of the model is cached where every layer would be cached whole; bytes from shapes."""

import pytest
import torch

import flashomni
from conftest import generation
from flashomni.engine import Recipe
from flashomni.models import adapters, cache_bytes

STEPS = 8
MODELS = ["FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"]


@pytest.mark.parametrize(
    ("recipe", "at_output"),
    [
        (Recipe.of("taylorseer"), True), (Recipe.of("fora"), True),
        (Recipe.of("taylorseer", level="layers"), False),
        (Recipe.of("taylorseer", degrade_below=0.5), False), (Recipe.of("flashomni"), False),
        (Recipe.of("dbcache"), False), (Recipe.of("fbcache"), False), (Recipe.of("pab"), False),
        (Recipe.of("balanced"), True), (Recipe.of("easycache"), True),
        (Recipe.of("cached", degrade_below=1.0), True),
        (Recipe.of("cached"), False),
        (Recipe.of("fora").replace(forecast={"name": "fitted", "fitted": {"num_steps": 8}}), True),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else None,
)  # fmt: skip
def test_where_the_output_is_cached(recipe, at_output):
    """Where all layers are cached whole in every Dispatch step, unless told otherwise."""
    assert recipe.at_output is at_output
    assert Recipe.from_dict(recipe.to_dict()).at_output is at_output


def seen(model, level):
    """What is forecast at a level, of each call: the output, or what all blocks add to vision."""
    found, entrance = [], []
    if level == "output":
        handles = [model.register_forward_hook(lambda _, args, output: found.append(output[0]))]
    else:
        handles = [
            model.x_embedder.register_forward_hook(lambda _, args, output: entrance.append(output)),
            model.norm_out.register_forward_pre_hook(
                lambda _, args: found.append(args[0] - entrance[-1])
            ),
        ]
    return found, handles


@pytest.mark.parametrize("level", ["layers", "output"])
def test_a_step_that_is_left_out_lies_on_the_line(flux, level):
    """Order 1: through the last two computed steps, at the step itself, however far it is."""
    model, inputs = flux
    recipe = f"taylorseer:interval=4,warmup=0,layer_order=1,level={level}"
    with torch.no_grad(), flashomni.accelerate(model, recipe) as engine:
        values, handles = seen(model, level)  # behind the engine's own hooks
        generation(engine, model, inputs, steps=12)
        kinds = [step["kind"] for step in engine.report().steps]
    for handle in handles:
        handle.remove()
    computed, far = [], 0
    for step, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        if kind != "dispatch":
            computed.append(step)
        elif len(computed) > 1:
            before, last = computed[-2:]
            slope = (values[last] - values[before]) / (last - before)
            line = values[last] + (step - last) * slope
            torch.testing.assert_close(value, line, atol=1e-4, rtol=1e-3)
            far += step - last > 1
    assert far == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ("fora", torch.float32),
        ("taylorseer:layer_order=2,history_dtype=bfloat16", torch.float32),
        ("fora:history_dtype=float8", torch.bfloat16),
    ],
    ids=str,
)
def test_bytes_are_known_before(name, recipe, dtype):
    """What shapes say is what the engine keeps, at either level."""
    model, inputs = adapters()[name].tiny()
    model = model.eval().to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    expected = cache_bytes(model, inputs, recipe)
    kept = {}
    for level in ("output", "layers"):
        chosen = Recipe.of(recipe).replace(level=level, interval=2, warmup=0.0)
        with torch.no_grad(), flashomni.accelerate(model, chosen) as engine:
            for step in range(STEPS):
                engine.step(step, STEPS)
                model(**inputs)
            kept[level] = engine.report().cache_bytes
    assert kept == {"output": expected.output, "layers": expected.layers}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_keep_a_twentieth(name):
    """FLUX at 1,024 pixels, HunyuanVideo at 129 frames of 720p: nothing is computed."""
    import diffusers

    def shape(*sizes):
        return torch.empty(*sizes, dtype=torch.bfloat16, device="meta")

    with torch.device("meta"):
        model = getattr(diffusers, name)(guidance_embeds=True)
    torch.nn.Module.to(model, torch.bfloat16)
    one = {"timestep": shape(1), "guidance": shape(1), "pooled_projections": shape(1, 768)}
    inputs = {
        "FluxTransformer2DModel": {
            "hidden_states": shape(1, 4096, 64), "encoder_hidden_states": shape(1, 512, 4096),
            "img_ids": shape(4096, 3), "txt_ids": shape(512, 3),
        },
        "HunyuanVideoTransformer3DModel": {
            "hidden_states": shape(1, 16, 33, 90, 160),
            "encoder_hidden_states": shape(1, 256, 4096), "encoder_attention_mask": shape(1, 256),
        },
    }[name]  # fmt: skip
    found = cache_bytes(model, {**one, **inputs}, "taylorseer")
    wanted = {
        "FluxTransformer2DModel": (2 * 4096 * 64 * 2, 2 * (4096 + 512) * 3072 * 2),
        "HunyuanVideoTransformer3DModel": (
            2 * 16 * 33 * 90 * 160 * 2, 2 * (33 * 45 * 80 + 256) * 3072 * 2
        ),
    }[name]  # fmt: skip
    assert (found.output, found.layers) == wanted
    assert found.layers > 20 * found.output
