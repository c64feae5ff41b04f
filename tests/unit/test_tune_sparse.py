"""Sparse attention in ``flashomni.tune``, end to end on a toy pipeline."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from flashomni.engine import Recipe
from flashomni.lab import zoo
from flashomni.tuning import Settings, spending, tune, tuner
from flashomni.tuning.page import in_words
from flashomni.tuning.sparse import Spent, Tried
from flashomni.tuning.validate import HeldBack

PROMPTS = ["a red circle", "a blue square", "a green ring"]
FEW = Settings(tries=1, probes=2, probed=1, sparse=0, groups=0)


@pytest.fixture(scope="module")
def loaded():
    """A pipeline that generates in a moment; its random weights do amplify errors."""
    loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1)
    loaded.call.update(height=64, width=64, num_inference_steps=8)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("price", [-1e3, 1e3])
def test_sparse_attention_that_pays_is_part_of_the_recipe(loaded, tmp_path, monkeypatch, price):
    """Measured on the real output, validated on held-back prompts, and said where it was not."""
    asked = []

    def bought(measure, recipe, layers, price, options, layer_runs, order):
        groups = ({"layers": "0:1", **options[0]},)
        sparse = recipe.replace(groups=list(groups))
        tries = measure.run(recipe, lambda *_: False), measure.run(sparse, lambda *_: True)
        asked.append((*tries, measure.apart(sparse), layers, price, order))
        with monkeypatch.context() as patch:  # found before: not run again
            patch.setattr(spending, "timed", lambda *_: pytest.fail("was measured already"))
            patch.setattr(spending, "accelerate", lambda *_: pytest.fail("was measured already"))
            assert measure.run(sparse, lambda *_: False) == tries[1]
            assert measure.apart(sparse) == asked[0][2]
        tried = Tried(groups, 0.1, 0.0, 1.0)
        return Spent((tried,), tried, 1.0, price=price)

    def timed(held, recipe, computed):
        found, picture = run(held, recipe, computed)
        return [replace(each, seconds=0.5 if recipe.groups else 1.0) for each in found], picture

    run = HeldBack.run
    monkeypatch.setattr(tuner, "spend", bought)
    monkeypatch.setattr(HeldBack, "run", timed)
    monkeypatch.setattr(tuner.Tuner, "_price", lambda self, *_: price)
    options = {"call": loaded.call, "pareto": [4], "settings": replace(FEW, sparse=1, probed=2)}
    found = tune(loaded.pipe, PROMPTS, out=tmp_path / "mine.json", **options)
    plain, sparse, apart, *rest = asked[0]
    assert rest == [2, price, "hilbert"] and plain.seconds > 0
    assert plain.levels[0] != sparse.levels[0] and apart == sparse.apart[0] < 300 == plain.apart[0]
    assert sparse.skipped[0] > 0 and plain.skipped == [0.0, 0.0] and sparse.skipped[1] == 0
    # What is of no use on the first is not run on more.
    assert (len(plain.levels), len(sparse.levels)) == (2, 1)
    assert len(found.recipe.groups) == (price > 0) and found.recipe.at_output
    assert ("does not pay" in in_words(found.chosen)) == (price < 0)
    assert Recipe.load(tmp_path / "mine.json") == found.recipe


@pytest.mark.slow
def test_layers_that_lose_least_are_sparse(loaded, tmp_path, monkeypatch):
    """On a clock on which the first layer takes longer; stopped in between, it goes on there."""

    def by_flops(*args):
        found = timed(*args)
        first, second = found.skipped
        return replace(found, seconds=1.0 - (second - first / 2) / 2e7)

    def sooner(self, recipe, computed):
        found, picture = run(self, recipe, computed)
        return [replace(each, seconds=0.5 if recipe.groups else 1.0) for each in found], picture

    def stops(self, recipe):
        if asked:
            raise KeyboardInterrupt
        asked.append(apart(self, recipe))
        return asked[0]

    timed, run, apart, asked = spending.timed, HeldBack.run, spending.Spending.apart, []
    monkeypatch.setattr(spending, "timed", by_flops)
    monkeypatch.setattr(HeldBack, "run", sooner)
    monkeypatch.setattr(tuner.Tuner, "_price", lambda self, *_: 0.7)
    few = replace(FEW, sparse=1, layer_runs=2)
    options = {"call": loaded.call, "pareto": [4], "settings": few, "out": tmp_path / "mine.json"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(spending.Spending, "apart", stops)
        tune(loaded.pipe, PROMPTS, **options)
    with monkeypatch.context() as patch:
        patch.setattr(spending, "timed", lambda *args: late.append(args[1]) or by_flops(*args))
        late = []
        found = tune(loaded.pipe, PROMPTS, **options).chosen
    assert [recipe.groups[0].layers for recipe in late] == ["1:2"]  # the rest was measured before
    (first, second), whole = found.spent.errors, found.spent.tried[0]
    assert first[:2] == (0, 1) and second[:2] == (1, 2) and first[2][0] > 2 * second[2][0]
    assert found.spent.probed == (0,) and len(asked) == 1
    assert [group.layers for group in found.recipe.groups] == ["1:2"]
    chosen = found.spent.chosen
    assert chosen.surplus > whole.surplus > 0 and chosen.surplus > chosen.predicted_db > 0
    assert found.recipe.sparse.token_order == "hilbert"
    assert "pays, topk 0.5 in layers 1:2: " in in_words(found)


def test_sparse_attention_that_did_not_pay_is_not_tried_with_more_steps():
    """With fewer there was more to win; with more nothing has been said yet."""
    fake = SimpleNamespace(settings=replace(FEW, sparse=1), _pays={4: False})
    assert tuner.Tuner._spend(fake, None, 5) is None
    fake._stage = ""
    fake.driver = None
    with pytest.raises(AttributeError, match="model"):
        tuner.Tuner._spend(fake, None, 4)
