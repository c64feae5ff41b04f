"""tiny-wan's training: the forward pass in parts, text, positions, ranks, checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import flashomni_assets
import pytest
import torch
from diffusers import WanTransformer3DModel
from training import evaluate, flow, ladder, tiny_models, wan, wan_model
from training.pool import ClipPool
from training.ranks import Ranks

import flashomni
from flashomni.lab import zoo

VIDEO = Path(flashomni_assets.__file__).parent / "tiny-video"
CAPTIONS = ["a red star resting on a grey floor", "a blue ring left of a red moon on a white floor"]


def small_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model.eval()


@pytest.fixture(scope="module")
def pipe():
    return wan_model.build(VIDEO)


def test_the_forward_pass_in_parts_is_the_stock_models() -> None:
    model = small_transformer()
    latents, text = torch.randn(2, 4, 3, 6, 10), torch.randn(2, 9, 12)
    timestep, seen = torch.tensor([300.0, 900.0]), []
    network = wan_model.Network(model)
    network.watch = lambda q, k, text: seen.append((q.shape, k.shape, text))
    with torch.no_grad():
        stock = model(latents, timestep, text, return_dict=False)[0]
        ours = network(latents, timestep, text)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    assert seen == [((2, 3 * 3 * 5, 2, 16), (2, 3 * 3 * 5, 2, 16), 0)] * 2


def test_text_is_what_the_pipeline_makes_of_it_cut_or_not(pipe) -> None:
    tokens = tiny_models.tokenize(pipe, CAPTIONS)
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt(
            CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=64
        )
        states, pooled = tiny_models.encode_text(pipe, tokens)
        longest = int(tokens["mask"].sum(1).max())
        cut, _ = tiny_models.encode_text(pipe, {k: v[:, :longest] for k, v in tokens.items()})
    assert pooled is None and states.shape == (2, 64, 64)
    torch.testing.assert_close(states, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut, wanted, rtol=1e-5, atol=1e-6)
    assert not states[0, int(tokens["mask"][0].sum()) :].any()


def test_the_pipeline_begins_at_zero_and_fits_what_is_left_for_it(pipe) -> None:
    latents = torch.randn(1, 8, 2, 4, 4)
    text, _ = tiny_models.encode_text(pipe, tiny_models.tokenize(pipe, CAPTIONS[:1]))
    out = pipe.transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    assert not out.any()
    weights = sum(p.numel() for m in tiny_models.modules(pipe).values() for p in m.parameters())
    assert 2 * weights < 5.4e6  # bf16; tokenizer and configs are 0.03 MB
    config = pipe.vae.config
    assert config.latents_std == [1 / config.scaling_factor] * config.z_dim
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (4, 4)


def test_evaluations_sample_as_the_pipeline_does(monkeypatch) -> None:
    pipe = wan_model.build(VIDEO)
    pipe.set_progress_bar_config(disable=True)
    for weight in pipe.transformer.parameters():
        weight.data.add_(torch.randn_like(weight), alpha=0.03)
    monkeypatch.setattr(evaluate.DiffusionPipeline, "from_pretrained", lambda *a, **k: pipe)
    model = evaluate.Model("", "cpu", guidance=2.0)
    latents = torch.randn(1, 8, 2, 4, 8, generator=torch.Generator().manual_seed(3))
    tokens = model.tokens(CAPTIONS[0])
    ours = flow.sample(
        pipe, model, latents.shape, tokens, 0.0, 4, 3, model.predict, model.sigmas(4)
    )
    call = {"height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 4}
    call["max_sequence_length"] = tiny_models.TEXT_TOKENS
    stock = pipe(CAPTIONS[0], latents=latents, guidance_scale=2.0, output_type="pt", **call)
    ours = (ours / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(ours, stock.frames, rtol=1e-3, atol=1e-3)


def test_short_clips_have_the_positions_of_whole_ones() -> None:
    rope = small_transformer().rope
    whole = rope(torch.empty(1, 4, 8, 4, 6))
    short = flow.StageRope(rope, 4, dim=1)(torch.empty(1, 4, 2, 4, 6))
    for a, b in zip(short, whole, strict=True):
        frames = b.unflatten(1, (8, 6))  # latent frames 0 and 4 - 1.125, rounded
        assert torch.equal(a, frames[:, [0, 3]].flatten(1, 2))


def test_phases_of_wan_end_at_whole_clips_of_all_sizes() -> None:
    ends = [end for end, _ in ladder.WAN_PHASES]
    assert ends == sorted(ends) and ends[-1] == 1.0
    for _, shares in ladder.WAN_PHASES:
        assert sum(shares.values()) == pytest.approx(1.0)
    assert {rung.tokens for rung in ladder.WAN_PHASES[-1][1]} == {4352, 17408, 32912}
    assert all(rung.batch(wan.BUDGET) > 1 for _, shares in ladder.WAN_PHASES for rung in shares)


def test_a_pool_for_padded_text_takes_any_clips(monkeypatch) -> None:
    class Source:
        class kind:
            video = True

        def take(self, count):
            mask = (torch.arange(10) < 5 + torch.arange(count)[:, None]).long()
            return range(count), {"text": mask, "mask": mask}

    monkeypatch.setattr("training.pool.encode", lambda vae, pixels: pixels)

    def draw(batch, size, times, detail):
        return torch.arange(len(batch)).float().view(-1, 1, 1, 1, 1)

    pool = ClipPool(Source(), draw, None, ladder.Rung(16, 5, 1.0, 9, 4), 4, alike=False)
    latents, tokens = pool.batch(4)
    assert sorted(latents.flatten().tolist()) == [0, 1, 2, 3]
    assert (tokens["mask"].sum(1) == 5 + latents.flatten()).all() and tokens["text"].shape == (
        4,
        10,
    )


RANK = """
import os, sys
import torch
from training.ranks import Ranks

import flashomni
from flashomni.lab import zoo
rank, store = int(os.environ["RANK"]), sys.argv[1]
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
ranks = Ranks("cpu")
assert ranks.agree([rank + 3.5, 7]) == [3.5, 7]
tensors = [torch.full((2, 3), float(rank)), torch.tensor([rank * 10.0])]
ranks.mean_(tensors)
assert (tensors[0] == 0.5).all() and tensors[1].item() == 5.0
weights = [torch.nn.Parameter(torch.full((2,), float(rank + 1)))]
ranks.copy_(weights)
assert (weights[0] == 1).all() and weights[0].requires_grad
ranks.close()
"""


@pytest.mark.slow
def test_ranks_agree_and_average(tmp_path) -> None:
    root = str(Path(ladder.__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store")],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "PYTHONPATH": root},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


@pytest.mark.slow
def test_a_run_learns_and_resumes_where_its_checkpoint_was_written(tmp_path) -> None:
    def run(out: Path) -> wan.Run:
        args = [
            "--out",
            str(out),
            "--seconds",
            "9",
            "--budget",
            "24",
            "--device",
            "cpu",
            "--no-bf16",
        ]
        return wan.Run(wan.parse([*args, "--rate", "1e-2"]), Ranks("cpu"))

    rung = ladder.Rung(16, 9, 1.0, 1, 2)
    tokens = tiny_models.tokenize(wan_model.build(VIDEO), CAPTIONS)
    clips = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(7))

    class Pool:
        def batch(self, count: int):
            return clips[:count], {k: v[:count] for k, v in tokens.items()}

    first, losses = run(tmp_path / "a"), []
    for _ in range(12):
        torch.manual_seed(0)  # the same noise: a model that learns must fit it
        losses.append(first.update(rung, Pool(), 0.1).item())
    assert losses[-1] < 0.9 * losses[0]
    first.save(12.5)
    again = run(tmp_path / "a")
    assert (again.step, again.before) == (12, 12.5)
    for one in (first, again):
        torch.manual_seed(2)
        one.update(rung, Pool(), 0.2)
    for name in ("live", "mean"):
        for a, b in zip(getattr(first, name), getattr(again, name), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_the_shipped_model_follows_its_prompt_under_a_preset() -> None:
    loaded = zoo.load("tiny-wan")
    loaded.pipe.set_progress_bar_config(disable=True)
    call = loaded.call | {"num_frames": 9, "num_inference_steps": 12, "output_type": "np"}

    def clip(prompt: str) -> torch.Tensor:
        made = loaded.pipe(prompt, generator=torch.Generator().manual_seed(0), **call).frames
        return torch.from_numpy(made).float()

    dense, other = clip(loaded.prompt), clip(loaded.prompts[0])
    flashomni.accelerate(loaded.pipe, "quality")
    gap = (clip(loaded.prompt) - dense).square().mean()
    assert 0 < gap < 0.1 * (other - dense).square().mean()
    assert sum(f.stat().st_size for f in zoo.bundled("tiny-wan").rglob("*") if f.is_file()) < 5.5e6
