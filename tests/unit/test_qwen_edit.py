"""Qwen-Image-Edit, Edit-Plus and Layered: pictures that are given, beside those generated."""

import pytest
import torch
from tiny_models import fill_gates
from torch import nn

import flashomni
from conftest import ONES, SPARSE, call, generation
from flashomni.engine import Recipe
from flashomni.models import adapters
from flashomni.policies.window import Window

pytestmark = pytest.mark.usefixtures("no_grad")

QWEN = "QwenImageTransformer2DModel"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")
# changes of the model, its pictures, further inputs, shape of what is generated, tokens given
VARIANTS = {
    "edit": ({}, [(1, 11, 13), (1, 9, 8)], {}, (1, 11, 13), 72),
    "edit plus": ({}, [(1, 11, 13), (1, 4, 7), (1, 3, 5)], {}, (1, 11, 13), 43),
    "edit plus 2511": (
        {"zero_cond_t": True}, [(1, 11, 13), (1, 4, 7), (1, 3, 5)], {}, (1, 11, 13), 43,
    ),
    "layered": (
        {"use_layer3d_rope": True, "use_additional_t_cond": True},
        [(1, 7, 9)] * 3 + [(1, 8, 5)],
        {"additional_t_cond": torch.zeros(2, dtype=torch.long)},
        (3, 7, 9),
        40,
    ),
}  # fmt: skip


@pytest.fixture(params=VARIANTS)
def variant(request):
    """``(model, inputs, shape, tokens given)``."""
    torch.manual_seed(0)
    changes, pictures, more, shape, given = VARIANTS[request.param]
    known = adapters()[QWEN]
    model = type(known.build("tiny"))(**{**known.sizes["tiny"], **changes}).eval()
    fill_gates(model)
    tokens = sum(frames * height * width for frames, height, width in pictures)
    inputs = {**known.tiny()[1], "hidden_states": torch.randn(2, tokens, 16), **more}
    return model, {**inputs, "img_shapes": [pictures] * 2}, shape, given


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
def test_every_variant_is_exact(variant, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    model, inputs, *_ = variant
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(7):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
        assert "dispatch" in {step["kind"] for step in engine.report().steps}
    assert torch.equal(call(model, inputs), stock)


def test_policies_see_what_is_given(variant, monkeypatch):
    """Generated tokens have a shape, those of given pictures are references, in front of the text;
    blocks of references are computed, and visited by everybody."""
    model, inputs, shape, given = variant
    sites, choose = [], Window.__call__
    monkeypatch.setattr(
        Window, "__call__", lambda self, site: sites.append(site) or choose(self, site)
    )
    vision = inputs["hidden_states"].shape[1]
    with flashomni.accelerate(model, "window:reach=.2,warmup=0,block_m=16,block_n=16") as engine:
        engine.step(0, 5)
        call(model, inputs)
        symbols = engine._runtime.last.branches["call"].layers[0].symbols
    grid = sites[0].grid
    assert grid.shape == shape and grid.spans == (("reference", vision - given, vision),)
    blocks = slice((vision - given) // 16, -(-vision // 16))
    assert symbols.q_mask()[..., blocks].all() and symbols.kv_mask()[..., blocks].all()
    assert not symbols.kv_mask().all()


def test_sparse_generations_repeat(variant):
    """The same bits twice, and another generation between them leaves nothing."""
    model, inputs, *_ = variant
    if inputs["hidden_states"].shape[-1] != call(model, inputs).shape[-1]:
        pytest.skip("latents have another width than the output")
    with flashomni.accelerate(model, SPARSE) as engine:
        first = generation(engine, model, inputs)
        other = {**inputs, "hidden_states": inputs["hidden_states"].flip(0)}
        generation(engine, model, other)
        assert torch.equal(generation(engine, model, inputs), first)


@pytest.mark.parametrize(
    "shapes", [[(1, 7, 9), (1, 9, 7), (1, 8, 5)], [(1, 8, 5)], [(2, 7, 9)] * 2]
)
def test_layers_of_several_sizes_have_no_shape(shapes):
    """They cannot be told apart as frames of one size."""
    from flashomni.models.blocks.positions import of_image_shapes

    assert of_image_shapes([shapes], layered=True).shape is None


# ---------------------------------------------------------------- whole pipelines


@pytest.fixture(params=["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def pipeline(request, monkeypatch):
    import importlib

    import diffusers
    from PIL import Image

    torch.manual_seed(0)
    cls = getattr(diffusers, request.param)
    plus = "Plus" in request.param
    size = (48, 64) if plus else (48, 64, None)  # in place of about a million pixels
    module = importlib.import_module(cls.__module__)
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: size)
    known = adapters()[QWEN]
    config = {**known.sizes["tiny"], "in_channels": 64, "out_channels": 16, "zero_cond_t": plus}
    model = type(known.build("tiny"))(**config).eval()
    fill_gates(model)
    vae = diffusers.AutoencoderKLQwenImage(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"text_encoder": None, "tokenizer": None, "processor": None}
    pipe = cls(scheduler=scheduler, vae=vae.eval(), transformer=model, **parts)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").resize((48, 64)).convert("RGB")
    text = torch.randn(1, 13, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(13)[None] < 11

    def generate(seed=0):
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            image=[picture, picture] if plus else picture, height=64, width=80,
            prompt_embeds=text, prompt_embeds_mask=mask, negative_prompt_embeds=-text,
            negative_prompt_embeds_mask=mask, true_cfg_scale=4.0, num_inference_steps=8,
            output_type="latent", generator=generator, return_dict=False,
        )[0]  # fmt: skip

    return pipe, generate


def test_a_whole_pipeline(pipeline):
    """lossless is stock; guidance is two branches; a sparse recipe repeats; nothing is left."""
    pipe, generate = pipeline
    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, atol=1e-4, rtol=1e-3)
        taken = [(step["step"], step["branch"]) for step in engine.report().steps]
    assert taken == [(step, name) for step in range(8) for name in ("cond", "uncond")]
    with flashomni.accelerate(pipe, SPARSE.replace(block_m=16, block_n=16)):
        first = generate()
        generate(1)
        assert torch.equal(generate(), first)
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-4)
    assert torch.equal(generate(), stock)


class Kept(nn.Module):
    """A block by hand: where nothing is computed, it adds what it added last in that branch."""

    def __init__(self, block, computes):
        super().__init__()
        self.block, self.computes, self.count, self.kept = block, computes, 0, [None, None]

    def forward(self, hidden_states, encoder_hidden_states, **rest):
        step, branch = divmod(self.count, 2)
        self.count += 1
        x, c = hidden_states, encoder_hidden_states
        if self.computes[step]:
            out = self.block(hidden_states=x, encoder_hidden_states=c, **rest)
            self.kept[branch] = out[0] - c, out[1] - x
            return out
        return c + self.kept[branch][0], x + self.kept[branch][1]


def test_whole_layer_caching_is_the_one_by_hand(pipeline):
    """Order 0, end to end, both branches."""
    pipe, generate = pipeline
    recipe = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
    with flashomni.accelerate(pipe, recipe):
        cached = generate()
    computes = [kind.value != "dispatch" for kind in recipe.plan(8).kinds]
    blocks = pipe.transformer.transformer_blocks
    pipe.transformer.transformer_blocks = nn.ModuleList(Kept(each, computes) for each in blocks)
    torch.testing.assert_close(cached, generate(), atol=1e-4, rtol=1e-3)
