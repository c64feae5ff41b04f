"""Stable Diffusion 3 and 3.5: a second attention, a last block without text, layers left out."""

import pytest
import torch
from tiny_models import fill_gates

import flashomni
from conftest import ONES, SPARSE, call, run
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

SD3 = "SD3Transformer2DModel"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")
VARIANTS = {
    "3": {"dual_attention_layers": (), "qk_norm": None},
    "3.5 large": {"dual_attention_layers": ()},
    "3.5 medium": {},
}


def build(**changes):
    torch.manual_seed(0)
    known = adapters()[SD3]
    model = type(known.build("tiny"))(**{**known.sizes["tiny"], **changes}).eval()
    fill_gates(model)
    return model, dict(known.tiny()[1])


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_exact(variant, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    model, inputs = build(**VARIANTS[variant])
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(7):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
        assert "dispatch" in {step["kind"] for step in engine.report().steps}
    assert torch.equal(call(model, inputs), stock)


def test_each_attention_has_tiles_of_its_own():
    """Chosen by its own queries and keys, over its own sequence; both are counted and skipped."""
    model, inputs = build()
    with flashomni.accelerate(model, SPARSE) as engine:
        for step in range(4):
            engine.step(step, 10)
            call(model, inputs)
        layers = engine._runtime.last.branches["call"].layers
    assert [layer.beside is None for layer in layers] == [False, False, True]
    first, second = layers[0], layers[0].beside
    assert (first.symbols.grid.seqlen_q, second.symbols.grid.seqlen_q) == (342 + 77, 342)
    assert first.history is not second.history and second.bias_terms is not None
    assert set(map(id, second.tensors())) < set(map(id, first.tensors()))
    alone, _ = build(dual_attention_layers=())
    share = [run(each, inputs, SPARSE)[1] for each in (model, alone)]
    for op in ("attention", "gemm_q", "gemm_o"):
        assert share[0].flops_dense[op] > 1.2 * share[1].flops_dense[op]
        assert share[0].flops_executed[op] < 0.9 * share[0].flops_dense[op]


def test_a_layer_is_cached_whole_with_both_or_not_at_all():
    """Whole-layer caching is the first one's decision: the second keeps no heads then."""
    model, inputs = build()
    with flashomni.accelerate(model, "fora:warmup=0,level=layers") as engine:
        for step in range(3):
            engine.step(step, 10)
            call(model, inputs)
        layers = engine._runtime.last.branches["call"].layers
        assert all(layer.degraded for layer in layers)
        assert all(c.beside.degraded and c.beside.history is None for c in layers if c.beside)


def test_projections_of_the_second_attention_that_are_not_plain_are_named():
    """They run dense, with the same result, and the report says so."""
    model, inputs = build()
    plain, _ = run(model, inputs, SPARSE)

    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    attn = model.transformer_blocks[0].attn2
    wrapped = Wrapped(attn.to_q.in_features, attn.to_q.out_features)
    wrapped.load_state_dict(attn.to_q.state_dict())
    attn.to_q = wrapped
    called, summary = run(model, inputs, SPARSE)
    torch.testing.assert_close(plain, called, atol=2e-4, rtol=1e-3)
    assert any("transformer_blocks.0" in n and "not a plain Linear" in n for n in summary.notes)


def test_residuals_of_a_control_net():
    """Added behind blocks, in every step, in either order of tokens."""
    model, inputs = build()
    inputs["block_controlnet_hidden_states"] = [torch.randn(2, 342, 48) for _ in range(2)]
    stock = call(model, inputs)
    for recipe in (ONES, TILES, ONES.replace(token_order="hilbert"), "fora:warmup=0,level=layers"):
        with flashomni.accelerate(model, recipe) as engine:
            for step in range(4):
                engine.step(step, 9)
                torch.testing.assert_close(call(model, inputs), stock, **CLOSE)


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
def test_layers_that_guidance_leaves_out(recipe):
    """Skip-layer guidance: a branch whose calls run without some blocks."""
    model, inputs = build()
    calls = {"cond": inputs, "skip": {**inputs, "skip_layers": [1]}}
    stock = {name: call(model, each) for name, each in calls.items()}
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(5):
            for name, each in calls.items():
                engine.step(step, 9, name)
                torch.testing.assert_close(call(model, each), stock[name], **CLOSE)


def test_chunked_mlps_are_refused():
    """Undone, the model is accelerated."""
    model, _ = build()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(64, 1)
    with pytest.raises(NotImplementedError, match=r"transformer_blocks\.0 runs its MLP in chunks"):
        flashomni.accelerate(model)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(None)
    flashomni.accelerate(model).remove()


@pytest.mark.slow
def test_a_whole_pipeline():
    """Guidance doubles the batch, skip-layer guidance calls once more in some steps."""
    import diffusers

    model, _ = build()
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    encoders = {
        f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")
    }
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=model, vae=vae.eval(), **encoders,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text, pooled = torch.randn(1, 13, 24), torch.randn(1, 20)

    def generate(seed=0):
        return pipe(
            prompt_embeds=text, negative_prompt_embeds=-text, pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=-pooled, height=36, width=28, num_inference_steps=10,
            skip_guidance_layers=[1], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7,
            output_type="latent", generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip

    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, atol=1e-4, rtol=1e-3)
        branches = [step["branch"] for step in engine.report().steps]
    assert branches.count("call") == 10 and 2 <= branches.count("call#1") <= 6
    with flashomni.accelerate(pipe, SPARSE.replace(block_m=16, block_n=16)):
        first = generate()
        generate(1)
        assert torch.equal(generate(), first)
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-4)
    assert torch.equal(generate(), stock)
