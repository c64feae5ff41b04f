"""Whole pipelines of Wan's family, as small as they get, against stock and a definition by hand."""

import pytest
import torch
from tiny_models import fill_gates
from torch import nn

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
STEPS = 8
SPARSE = Recipe.of("topk:q_density=.5,kv_density=.6,interval=3,warmup=.2,block_m=16,block_n=16")
WHOLE = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
TEXT = torch.randn(1, 512, 24, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(1, 5, 20, generator=torch.Generator().manual_seed(2))


def expert(name, **changes):
    tiny = {**adapters()[name].sizes["tiny"], "num_layers": 2}
    config = {**tiny, "in_channels": 16, "out_channels": 16, **changes}
    model = adapters()[name].build("tiny").from_config(config).eval()
    fill_gates(model)
    return model


def pipeline(name, parts):
    import diffusers

    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    left_out = {"tokenizer": None, "text_encoder": None}
    return getattr(diffusers, name)(vae=vae, scheduler=scheduler, **left_out, **parts)


def picture():
    from PIL import Image

    return Image.linear_gradient("L").resize((48, 64)).convert("RGB")


WAN, SKYREELS = "WanTransformer3DModel", "SkyReelsV2Transformer3DModel"
WITH_IMAGE = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48}
CHRONO = {**WITH_IMAGE, "attention_head_dim": 24, "num_attention_heads": 2}
FIRST_FRAME = {"expand_timesteps": True}
PIPELINES = {
    "i2v": lambda: (
        pipeline("WanImageToVideoPipeline", {"transformer": expert(WAN, **WITH_IMAGE)}),
        {"image": picture()},
    ),
    "i2v of two": lambda: (
        pipeline(
            "WanImageToVideoPipeline",
            {
                "transformer": expert(WAN, in_channels=36),
                "transformer_2": expert(WAN, in_channels=36),
                "boundary_ratio": 0.8,
            },
        ),
        {"image": picture()},
    ),
    "ti2v, text": lambda: (
        pipeline("WanPipeline", {"transformer": expert(WAN), **FIRST_FRAME}), {}
    ),
    "ti2v, image": lambda: (
        pipeline("WanImageToVideoPipeline", {"transformer": expert(WAN), **FIRST_FRAME}),
        {"image": picture()},
    ),
    "vace": lambda: (
        pipeline(
            "WanVACEPipeline",
            {"transformer": expert("WanVACETransformer3DModel", vace_in_channels=96)},
        ),
        {"video": [picture()] * 9, "mask": [picture().convert("L")] * 9},
    ),
    "skyreels": lambda: (pipeline("SkyReelsV2Pipeline", {"transformer": expert(SKYREELS)}), {}),
    "chrono edit": lambda: (
        pipeline(
            "ChronoEditPipeline",
            {
                "transformer": expert("ChronoEditTransformer3DModel", **CHRONO),
                "image_encoder": None,
                "image_processor": None,
            },
        ),
        {"image": picture()},
    ),
}  # fmt: skip


@pytest.fixture(params=PIPELINES)
def family(request):
    torch.manual_seed(0)
    pipe, given = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_image = lambda image, device: IMAGE

    def generate(seed=0):
        size = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": STEPS}
        text = {"prompt_embeds": TEXT, "negative_prompt_embeds": -TEXT, "guidance_scale": 4.0}
        generator = torch.Generator().manual_seed(seed)
        return pipe(**given, **size, **text, output_type="latent", generator=generator).frames

    return pipe, generate


def test_lossless_is_stock_and_sparse_repeats_itself(family):
    """End to end; both calls of a step are branches, named or not; nothing is left behind."""
    pipe, generate = family
    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, **CLOSE)
        report = engine.report()
    assert report.tier == "adapter"
    taken = [(step["step"], step["branch"]) for step in report.steps]
    contexts = {"cond", "uncond"} if ("cond" in report.steps[0]["branch"]) else {"call", "call#1"}
    assert taken == [(step, name) for step in range(STEPS) for name in sorted(contexts)]
    with flashomni.accelerate(pipe, SPARSE) as engine:
        first = generate()
        generate(1)
        assert torch.equal(generate(), first)
        assert "dispatch" in {step["kind"] for step in engine.report().steps}
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-4)
    assert torch.equal(generate(), stock)


class Kept(nn.Module):
    """A block by hand: where nothing is computed, it adds what it added last in that branch."""

    def __init__(self, block, computes):
        super().__init__()
        self.block, self.count, self.kept = block, 0, [None, None]
        self.computes = computes

    def forward(self, x, *rest):
        step, branch = divmod(self.count, 2)
        self.count += 1
        control = hasattr(self.block, "proj_in")
        before = rest[1] if control else x
        if self.computes[step]:
            out = self.block(x, *rest)
            self.kept[branch] = (out[1] if control else out) - before
            return out
        behind = before + self.kept[branch]
        return (self.block.proj_out(behind), behind) if control else behind


def test_whole_layer_caching_is_the_one_by_hand(family):
    """Order 0: each block, of control too, adds what it added at the last Update."""
    pipe, generate = family
    with flashomni.accelerate(pipe, WHOLE):
        cached = generate()
    above = int((pipe.scheduler.timesteps >= 800).sum())
    second = getattr(pipe, "transformer_2", None)
    shares = [above, STEPS - above] if second is not None else [STEPS]
    for part, count in zip([pipe.transformer, second], shares, strict=False):
        computes = [kind.value != "dispatch" for kind in WHOLE.plan(count).kinds]
        assert False in computes
        for name in ("blocks", "vace_blocks"):
            blocks = getattr(part, name, [])
            kept = [Kept(block, computes) for block in blocks]
            if kept:
                setattr(part, name, nn.ModuleList(kept))
    torch.testing.assert_close(cached, generate(), **CLOSE)


def test_frames_that_see_only_earlier_ones_are_refused():
    """SkyReels V2 masks its own tokens then."""
    model = expert(SKYREELS, num_frame_per_block=2)
    with pytest.raises(NotImplementedError, match="num_frame_per_block=2"):
        flashomni.accelerate(model)


def test_frames_with_timesteps_of_their_own():
    """SkyReels V2 with diffusion forcing, by announced steps: constant inputs, caching is exact."""
    torch.manual_seed(0)
    model, inputs = expert(SKYREELS), adapters()[SKYREELS].tiny()[1]
    inputs = {**inputs, "hidden_states": torch.randn(2, 16, 5, 10, 6)}
    inputs |= {"timestep": torch.rand(2, 5) * 900, "enable_diffusion_forcing": True}
    stock = model(**inputs).sample
    for recipe in ("lossless", WHOLE):
        with flashomni.accelerate(model, recipe) as engine:
            for step in range(5):
                engine.step(step, 6)
                torch.testing.assert_close(model(**inputs).sample, stock, **CLOSE)
