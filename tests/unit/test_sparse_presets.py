"""The preset that skips key blocks on top of caching, and the setting for few steps."""

import pytest
import torch

import flashomni
from conftest import generation
from flashomni.engine import Recipe
from flashomni.engine.symbols_file import SymbolsFile
from flashomni.models import adapters
from flashomni.symbols import Grid, Symbols

FEW = (
    "topk:q_density=1,diagonal=true,text_rows=true,kv_density=0.25,interval=1,warmup=0,"
    "in_computed=true,dense_steps=2,token_order=hilbert,summaries=4,resolution=8,choose_at=[1],"
    "carry=extrapolate,refresh=2,extrapolation=1"
)
# Steps of a generation, and what attention is in those that are computed: dense, refresh, sparse.
RECIPES = {"video": (28, "rssrssrssrs"), FEW: (8, "drsrsrsr")}


@pytest.fixture(scope="module", params=RECIPES, ids=["video", "few steps"])
def ran(request, tmp_path_factory):
    """Attention of the computed steps, report and symbols of a recipe, in blocks of 32."""
    steps, expected = RECIPES[request.param]
    recipe = Recipe.of(request.param).replace(block_m=32, block_n=32)
    path = tmp_path_factory.mktemp("symbols") / "chosen"
    torch.manual_seed(0)
    model, inputs = adapters()["HunyuanVideoTransformer3DModel"].tiny()
    with torch.no_grad(), flashomni.accelerate(model.eval(), recipe) as engine:
        generation(engine, model, inputs, steps)
        engine.save_symbols(path)
        return expected, engine.report(), SymbolsFile.load(path)


@pytest.mark.slow
def test_its_density_map_is_not_all_or_nothing(ran):
    """Sparse steps visit a part of the blocks in every layer; at least half of the computed."""
    expected, report, _ = ran
    computed = [step for step in report.steps if step["kind"] != "dispatch"]
    found = ""
    for step in computed:
        dense = all(density == 1 for density in step["kv_density"])
        assert dense or all(0.25 <= density < 0.7 for density in step["kv_density"])
        found += "r" if "refreshes" in step["does"] else "d" if dense else "s"
    assert found == expected
    if report.recipe["name"].startswith("video"):
        assert 2 * found.count("s") >= len(computed) == 11


def test_what_it_spends_is_what_it_computes(ran):
    """Recomputed of the symbols: live pairs and summaries, refreshes, dense steps; else nothing."""
    expected, report, symbols = ran
    live, shares = [], []
    for name, saved in symbols.grids.items():
        grid = Grid(**{key: _tuple(value) for key, value in saved.items()})
        q_bits, kv_bits = (symbols.tensors[f"{name}/{part}"] for part in ("q_bits", "kv_bits"))
        mask = Symbols(q_bits.expand(len(kv_bits), -1, -1), kv_bits, grid).kv_mask()
        mask[:, :, grid.text_q_mask(mask.device)] = True  # with carry text rows visit everything
        live.append(mask.float().mean().item())
        shares.append(4 * grid.num_kv_blocks / grid.seqlen_kv)
    assert len(live) == len(report.layers)
    cost = {"d": 1.0, "r": 1.0 + sum(shares) / len(shares)}
    cost["s"] = cost["r"] - 1.0 + sum(live) / len(live)
    spent = sum(cost[kind] for kind in expected) / len(report.steps)
    assert report.attention_spent == pytest.approx(spent, abs=1e-5)
    assert f"attention spent: {report.attention_spent:.3f} of dense" in str(report)


def _tuple(value):
    """JSON has lists only."""
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
