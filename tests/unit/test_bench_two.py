"""Whole generations with two transformers and guidance in calls of its own. No timing."""

import pytest
import torch
from typer.testing import CliRunner

from flashomni.cli import app
from flashomni.engine import Recipe
from flashomni.lab.e2e import breakdown, methods, models, ranks, session, sparsity, stock
from flashomni.lab.e2e.run import generate, weights_gib

PLAN = methods.Plan(steps=9, stock_steps=4)


@pytest.fixture(scope="module")
def model():
    return models.build("tiny-wan22", torch.device("cpu"), torch.float32)


def test_tokens_and_calls_are_those_of_the_call(model):
    """What the table says is what attention sees, in both; weights are those of both."""
    seen = {0: set(), 1: set()}
    handles = [
        each.blocks[0].register_forward_hook(
            lambda module, args, out, number=number: seen[number].add(out.shape[1])
        )
        for number, each in enumerate(model.transformers)
    ]
    run = generate(model, 6)
    for handle in handles:
        handle.remove()
    assert seen == {0: {model.tokens}, 1: {model.tokens}} and len(run.calls) == 6 * model.calls
    first = sum(x.numel() for x in model.pipe.transformer.parameters())
    assert weights_gib(model) == pytest.approx(2 * first * 4 / 2**30)


@pytest.mark.slow
def test_methods_on_both(model):
    """Stock and recipes are timed over both, peers are refused by name, nothing is left."""
    wanted = dict(methods.parse_measure(n) for n in ("fora", "lossless", "diffusers.pab"))
    results = session.Session(model, stock.make_stocks(["eager"]), wanted, PLAN).run()
    assert list(results.missing) == ["diffusers.pab"]
    assert "the pipeline has two" in results.missing["diffusers.pab"]
    assert [stock.leftovers(each) for each in model.transformers] == [[], []]
    baseline, fora = results.baselines["eager"], results.methods["fora"]
    assert len(baseline.calls["full"]) == 2 * (4 * model.calls - 1)
    middle = sorted(baseline.calls["full"])[len(baseline.calls["full"]) // 2]
    assert baseline.generation_s == pytest.approx(9 * model.calls * middle, rel=0.5)
    assert sum(map(len, fora.calls.values())) == 9 * model.calls and "dispatch" in fora.calls
    assert fora.densities["dispatch"] == 0.0 and results.methods["lossless"].estimated


def test_what_follows_one_transformer_is_refused(model):
    """Profiles and sweeps count the calls of one transformer."""
    with pytest.raises(NotImplementedError, match="a profile of tiny-wan22 is not supported"):
        breakdown.profile_recipe(Recipe.of("fora"), model)
    with pytest.raises(NotImplementedError, match="a profile of tiny-wan22 is not supported"):
        breakdown.profile_stock(stock.Stock(), model)
    with pytest.raises(NotImplementedError, match="a sweep of tiny-wan22 is not supported"):
        list(sparsity.sweep(model, [], ""))


@pytest.mark.slow
def test_what_is_not_as_published_is_said(monkeypatch):
    """Fewer blocks than the published model has, on the line of the command that names it."""
    small = models.MODELS["tiny-wan22"]
    note = models.MODELS["wan22"].note
    changed = type(small)(small.family, small.config, 7, 7, 32, 32, 5, note)
    monkeypatch.setitem(models.MODELS, "tiny-wan22", changed)
    arguments = ["bench", "e2e", "--model", "tiny-wan22", "--recipe", "fora", "--steps", "4"]
    done = CliRunner().invoke(app, [*arguments, "--stock-steps", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert note in " ".join(done.output.split())


def test_peers_of_an_evaluation_are_refused(model):
    """A cache on one of two transformers would be compared as if it were on both."""
    from flashomni.lab.fidelity.methods import parse_method

    method = parse_method("diffusers.pab")
    with (
        pytest.raises(NotImplementedError, match="and the pipeline has two"),
        method.attach(model.pipe, 8),
    ):
        pass


def test_names_say_what_was_asked_of_ranks():
    recipes = {"plain": Recipe.of("lossless")}
    assert list(ranks.methods_on(recipes, 2, 2)) == ["plain", "plain, 4 cards"]
    graphed = ranks.methods_on(recipes, 2, 1, graphs=True)
    assert list(graphed) == ["plain, graphs", "plain, 2 cards, graphs"]
