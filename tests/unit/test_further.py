"""Training on mixed sizes: attention without padding, rungs, pools, maps, checkpoints."""

import argparse
import json
from pathlib import Path

import flashomni_assets
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from training import attention, evaluate, flow, further, ladder, render, scenes, tiny_models
from training.pool import ClipPool, trimmed

SHIPPED = Path(flashomni_assets.__file__).parent / "tiny-video"


def small_transformer() -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def test_attention_without_padding_is_the_stock_models_with_it() -> None:
    model = small_transformer()
    latents, text = torch.randn(2, 4, 3, 6, 10), torch.randn(2, 9, 12)
    mask = torch.arange(9).expand(2, 9) < 5
    rest = {"timestep": torch.tensor([300.0, 900.0]), "pooled_projections": torch.randn(2, 8)}
    with torch.no_grad():
        stock = model(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask.float(),
            return_dict=False,
            **rest,
        )[0]
        seen = []
        attention.install(
            model, attention.Unpadded(watch=lambda q, k, text: seen.append((q.shape, text)))
        )
        ours = model(
            latents,
            encoder_hidden_states=text[:, :5],
            encoder_attention_mask=mask[:, :5].float(),
            return_dict=False,
            **rest,
        )[0]
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert seen == [((2, 3 * 3 * 5 + 5, 2, 16), 5)] * 2


def test_mass_of_blocks_is_that_of_the_softmax() -> None:
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(45, 2, 8, generator=gen) for _ in range(2))
    weight = torch.einsum("ihd,jhd->hij", q, k).mul(8**-0.5).softmax(-1)
    wanted = torch.stack(
        [
            torch.stack([part.sum(-1).mean(-1) for part in rows.split(16, 2)], -1)
            for rows in weight.split(16, 1)
        ],
        1,
    )
    mass = attention.block_mass(q, k, block=16)
    torch.testing.assert_close(mass, wanted)
    few = attention.block_mass(q, k, block=16, rows=2)
    torch.testing.assert_close(few, wanted[:, [0, 2]])
    assert attention.top_share(mass, 1 / 3) == pytest.approx(wanted.amax(-1).mean().item())


def test_tiles_are_squares_over_all_frames() -> None:
    grid = (3, 6, 5)  # neither side is a multiple of the tile
    order = attention.token_order(grid, 4)
    assert sorted(order.tolist()) == list(range(90))
    column, row = order % 5, order // 5 % 6
    first = slice(0, 3 * 4 * 4)
    assert row[first].max() == 3 and column[first].max() == 3
    assert attention.token_order(grid, 0).tolist() == list(range(90))


def test_rungs_have_the_promised_tokens_and_get_their_share() -> None:
    sizes = [ladder.SMALL, ladder.MIDDLE, ladder.LARGE]
    assert [rung.tokens for rung in sizes] == [4352, 17408, 32912]
    for _, shares in ladder.PHASES:
        assert sum(shares.values()) == pytest.approx(1.0)
    number, shares = ladder.phase(0.99)
    assert number == len(ladder.PHASES) - 1 and ladder.phase(0.0)[0] == 0
    spent: dict[str, float] = {}
    for _ in range(500):
        rung = ladder.choose(shares, spent)
        spent[rung.name] = spent.get(rung.name, 0.0) + rung.batch() * rung.seconds()
    total = sum(spent.values())
    for rung, share in shares.items():
        assert spent[rung.name] / total == pytest.approx(share, abs=0.02)


def test_levels_cover_the_noise_evenly() -> None:
    torch.manual_seed(0)
    levels = flow.spread_levels(7, "cpu")
    part = torch.special.ndtr(levels.logit())
    assert (part * 7).long().tolist() == list(range(7))


class FakeSource:
    """Scenes with 5, 6 or 7 text tokens, the number in turn."""

    class kind:
        video = True

    drawn = 0

    def take(self, count: int) -> tuple[range, dict[str, torch.Tensor]]:
        index = torch.arange(self.drawn, self.drawn + count)
        self.drawn += count
        mask = (torch.arange(10) < (5 + index % 3)[:, None]).long()
        return range(count), {"text": index[:, None] * mask, "mask": mask, "clip": index[:, None]}


def test_a_batch_has_captions_of_one_length_and_its_own_clips(monkeypatch) -> None:
    rung = ladder.Rung(16, 5, 1.0, reuse=2, first=6)
    monkeypatch.setattr("training.pool.encode", lambda vae, pixels: pixels)
    source = FakeSource()

    def renderer(batch, size, times, detail):
        assert (size, len(times), detail) == (16, 5, 1.0)
        start = source.drawn - len(batch)
        return torch.arange(start, source.drawn).float().view(-1, 1, 1, 1, 1)

    torch.manual_seed(0)
    pool = ClipPool(source, renderer, None, rung, capacity=12)
    assert source.drawn == 6
    for _ in range(20):
        latents, tokens = pool.batch(4)
        length = tokens["text"].shape[1]
        assert tokens["mask"].shape == (4, length) and tokens["mask"].all()
        index = tokens["clip"][:, 0]
        assert (5 + index % 3 == length).all()
        assert latents.flatten().tolist() == index.tolist()
    assert source.drawn == 6 + 20 * 4 // 2 // 6 * 6  # every clip is used twice on average
    assert pool.size == 12


def test_layouts_of_large_clips_leave_the_small_ones_as_they_were() -> None:
    note = json.loads((SHIPPED / "flashomni.json").read_text())
    prompts = tiny_models.heldout_prompts(tiny_models.VIDEO, 8)
    assert prompts == note["prompts"][:8]
    gen = torch.Generator().manual_seed(0)
    small = scenes.sample(300, gen, video=True)
    large = scenes.sample(300, gen, video=True, large=True)
    assert small.count.max() == 3 and large.count.max() == 4
    assert set(" ".join(scenes.captions(large)).split()) <= set(scenes.words())


def test_detail_makes_patterns_finer() -> None:
    scene = scenes.sample(1, torch.Generator().manual_seed(0), video=True)
    scene.pattern[:], scene.radius[:] = scenes.PATTERNS.index("striped"), 0.0
    times = torch.zeros(1)

    def edges(detail: float) -> int:
        row = render.render_clips(scene, 128, times, detail=detail)[0, 0, 0, 64]
        dark = row > row.median()
        return int((dark[1:] != dark[:-1]).sum())

    plain = render.render_clips(scene, 128, times)
    torch.testing.assert_close(
        plain, render.render_clips(scene, 128, times, detail=1.0), rtol=0, atol=0
    )
    assert edges(2.0) >= 1.8 * edges(1.0) > 0


def test_differences_of_scores_are_paired_by_caption() -> None:
    a = {0: [("colour", True), ("relation", False)], 1: [("shape", False), ("motion", True)]}
    b = {1: [("shape", False), ("motion", False)], 2: [("shape", True)]}
    assert evaluate.paired(a, b) == (0.5, 0.0, 1)
    assert evaluate.rates(a)["all statements"] == pytest.approx(2 / 3)
    assert trimmed({"text": torch.ones(1, 4), "mask": torch.ones(1, 4)}, 2)["text"].shape == (1, 2)


@pytest.mark.slow
def test_a_run_resumes_where_its_checkpoint_was_written(tmp_path) -> None:
    def run(out: Path, start: Path | None = None) -> further.Run:
        return further.Run(
            argparse.Namespace(
                out=out, start=start, device="cpu", total=100.0, rate=3e-4, budget=2 * 4 * 3
            )
        )

    rung = ladder.Rung(16, 9, 1.0, 1, 2)

    class Pool:
        def batch(self, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            gen = torch.Generator().manual_seed(7)
            latents = torch.randn(count, 8, 3, 4, 4, generator=gen)
            tokens = tiny_models.tokenize(first.pipe, ["a red star resting on a grey floor"])
            tokens = trimmed(tokens, int(tokens["mask"].sum()))
            return latents, {k: v.expand(count, -1) for k, v in tokens.items()}

    first = run(tmp_path / "a", SHIPPED)
    for _ in range(2):
        torch.manual_seed(first.step)
        assert first.update(rung, Pool(), 0.1).isfinite()
    first.stage = 1
    first.save(12.5)
    again = run(tmp_path / "a")
    assert again.place(12.5) == first.place(12.5) and again.before == 12.5
    for one in (first, again):
        torch.manual_seed(2)
        one.update(rung, Pool(), 0.2)
    for name in ("live", "mean"):
        for a, b in zip(getattr(first, name), getattr(again, name), strict=True):
            assert torch.equal(a, b)
    # Elsewhere: averaged weights, rounded to bf16, at the same place, and a new warm-up.
    other = run(tmp_path / "b", tmp_path / "a")
    assert (other.step, other.first, other.before, other.stage) == (2, 2, 12.5, 1)
    saved = run(tmp_path / "a")
    for a, b in zip(other.live, saved.mean, strict=True):
        # capital words are written with the weights of small ones, which have moved a little
        torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-4)
    assert other.rate(0.1) < saved.rate(0.1) * 0.5
