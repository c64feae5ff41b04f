"""CogVideoX and CogView4: RoPE tables of the pipeline, guidance, what is refused; end to end."""

import pytest
import torch
from tiny_models import fill_gates
from torch import nn

import flashomni
from conftest import ONES, SPARSE, call
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

VIDEO, VIEW = "CogVideoXTransformer3DModel", "CogView4Transformer2DModel"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")


def build(name, **changes):
    torch.manual_seed(0)
    known = adapters()[name]
    model = type(known.build("tiny"))(**{**known.sizes["tiny"], **changes}).eval()
    fill_gates(model)
    return model, dict(known.tiny()[1])


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
def test_rotary_tables_of_cogvideox(recipe):
    """5B: tables for the video come from the pipeline; in either order of tokens."""
    model, inputs = build(VIDEO, use_rotary_positional_embeddings=True)
    angles = torch.rand(5 * 9 * 7, 8).mul(6).repeat_interleave(2, dim=1)
    inputs["image_rotary_emb"] = angles.cos(), angles.sin()
    stock = call(model, inputs)
    recipe = Recipe.of(recipe)
    for order in ("raster", "hilbert"):
        with flashomni.accelerate(model, recipe.replace(token_order=order)) as engine:
            for step in range(5):
                engine.step(step, 9)
                torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
    assert torch.equal(call(model, inputs), stock)


def test_masks_of_cogview4_are_refused():
    """They add to the scores in stock; nothing is ignored."""
    model, inputs = build(VIEW)
    inputs["attention_mask"] = torch.arange(77)[None].expand(2, -1) < 30
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 5)
        with pytest.raises(NotImplementedError, match="attention_mask is not supported"):
            call(model, inputs)


def test_tables_for_each_item_are_refused():
    """CogView4 in training packs pictures of several sizes."""
    model, inputs = build(VIEW)
    inputs["image_rotary_emb"] = [(torch.ones(342, 16), torch.zeros(342, 16))] * 3
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 5)
        with pytest.raises(NotImplementedError, match="tables for each item"):
            call(model, inputs)


TEXT = torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["cogvideox", "cogview4"])
def pipeline(request):
    """``(pipe, generate, calls of the model in a step)``."""
    import diffusers

    left_out = {"tokenizer": None, "text_encoder": None, "vae": None}
    if request.param == "cogvideox":
        model, _ = build(VIDEO, use_rotary_positional_embeddings=True, sample_frames=9)
        pipe = diffusers.CogVideoXPipeline(
            transformer=model, scheduler=diffusers.CogVideoXDDIMScheduler(), **left_out
        )
        size = {"height": 144, "width": 112, "num_frames": 9}
    else:
        model, _ = build(VIEW)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.CogView4Pipeline(transformer=model, scheduler=scheduler, **left_out)
        size = {"height": 144, "width": 112}
    pipe.set_progress_bar_config(disable=True)

    def generate(seed=0):
        generator = torch.Generator().manual_seed(seed)
        text = {"prompt_embeds": TEXT, "negative_prompt_embeds": -TEXT, "guidance_scale": 4.0}
        options = {"num_inference_steps": 8, "output_type": "latent", "return_dict": False}
        return pipe(**size, **text, **options, generator=generator)[0]

    return pipe, generate, 1 if request.param == "cogvideox" else 2


@pytest.mark.slow
def test_a_whole_pipeline(pipeline):
    """lossless is stock; guidance in the batch, or a branch; a sparse recipe repeats its bits."""
    pipe, generate, calls = pipeline
    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, atol=1e-4, rtol=1e-3)
        report = engine.report()
    assert report.tier == "adapter"
    assert [step["step"] for step in report.steps] == sorted(list(range(8)) * calls)
    with flashomni.accelerate(pipe, SPARSE.replace(block_m=16, block_n=16)):
        first = generate()
        generate(1)
        assert torch.equal(generate(), first)
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-4)
    assert torch.equal(generate(), stock)


class Kept(nn.Module):
    """A block by hand: where nothing is computed, it adds what it added last in that branch."""

    def __init__(self, block, computes, calls):
        super().__init__()
        self.block, self.computes, self.calls = block, computes, calls
        self.count, self.kept = 0, [None] * calls

    def forward(self, hidden_states, encoder_hidden_states, *args, **kwargs):
        step, branch = divmod(self.count, self.calls)
        self.count += 1
        x, c = hidden_states, encoder_hidden_states
        if self.computes[step]:
            out = self.block(x, c, *args, **kwargs)
            self.kept[branch] = out[0] - x, out[1] - c
            return out
        return x + self.kept[branch][0], c + self.kept[branch][1]


def test_whole_layer_caching_is_the_one_by_hand(pipeline):
    """Order 0, end to end, all branches."""
    pipe, generate, calls = pipeline
    recipe = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
    with flashomni.accelerate(pipe, recipe):
        cached = generate()
    computes = [kind.value != "dispatch" for kind in recipe.plan(8).kinds]
    blocks = pipe.transformer.transformer_blocks
    kept = nn.ModuleList(Kept(block, computes, calls) for block in blocks)
    pipe.transformer.transformer_blocks = kept
    torch.testing.assert_close(cached, generate(), atol=1e-4, rtol=1e-3)
