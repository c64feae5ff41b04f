"""Sparse attention by layer: the exact choice, the errors it is made of, and what is run of it."""

import itertools
import json

import numpy as np
import pytest

from flashomni.engine import Recipe
from flashomni.tuning import sparse
from flashomni.tuning.layerwise import (
    Choice,
    Kind,
    Option,
    bisect,
    corners,
    options_of,
    surplus,
)

LAYERS = 6
PLAN = Recipe.of("cached", degrade_below=1.0, level="output")


def random_options(generator, places, kinds):
    """Some save nothing, some lose nothing, some are ties."""
    saved = generator.uniform(-0.2, 1.0, (places, kinds)).round(1)
    error = generator.exponential(0.5, (places, kinds)).round(1)
    return [
        [Option(*each) for each in zip(s, e, strict=True)]
        for s, e in zip(saved, error, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_exact(seed):
    """At any price: the best of the corners is the best of all combinations."""
    generator = np.random.default_rng(seed)
    options = random_options(generator, places=4, kinds=3)
    path = corners(options)
    assert path[0] == Choice((None,) * 4, 0.0, 0.0)
    assert [choice.saved for choice in path] == sorted(choice.saved for choice in path)
    for price in (0.0, 0.5, 2.0, 5.0, 20.0):
        best = -np.inf
        for picks in itertools.product((None, 0, 1, 2), repeat=4):
            taken = [mine[p] for mine, p in zip(options, picks, strict=True) if p is not None]
            total = sum(o.saved for o in taken), sum(o.error for o in taken)
            best = max(best, surplus(price, *total))
        chosen = max(path, key=lambda choice: choice.surplus(price))
        assert chosen.surplus(price) == pytest.approx(best, abs=1e-9)
        taken = [m[p] for m, p in zip(options, chosen.picks, strict=True) if p is not None]
        assert chosen.error == pytest.approx(sum(o.error for o in taken))
        assert chosen.saved == pytest.approx(sum(o.saved for o in taken))


def even(saved, error, layers=LAYERS):
    return Kind(saved, error, (1 / layers,) * layers, error)


def test_runs_of_layers_are_short_where_errors_are_large():
    """The run with the largest error is halved, within the generations that there are."""
    errors, asked = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 5.0]), []

    def probe(kind, start, stop):
        asked.append((start, stop))
        return float(errors[start:stop].sum())

    kinds = [even(3.0, float(errors.sum()))]
    runs = bisect(kinds, [0], probe, 7, 10.0)
    assert asked == [(0, 3), (3, 6), (3, 4), (4, 6), (4, 5), (5, 6)]
    assert [(run.start, run.stop) for run in runs] == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert len(bisect(kinds, [0], probe, 1, 10.0)) == 1
    assert len(bisect(kinds, [0], probe, 100, 0.01)) == 1  # nothing could pay
    assert len(bisect(kinds, [0], probe, 100, 10.0)) == LAYERS


def test_a_kind_that_was_not_measured_by_layer_loses_where_others_do():
    """And where errors of layers add up to more than their squares, all are charged with it."""
    kinds = [even(3.0, 4.0), even(6.0, 8.0)]
    runs = bisect(kinds, [0], lambda kind, start, stop: 0.5 if start == 0 else 1.5, 2, 50.0)
    first, second = options_of(kinds, [0], runs)
    assert [o.error for o in first] == pytest.approx([1.0, 2.0])
    assert [o.error for o in second] == pytest.approx([3.0, 6.0])
    assert [o.saved for o in first] == pytest.approx([1.5, 3.0])


class Layers:
    """Errors of layers in directions of their own, and the seconds of each; told what was run.

    ``prices`` gives seconds and error, over the plan's own, of a kind by its density, by layer.
    """

    def __init__(self, prices, together=1.0, faster=1.0):
        self.prices, self.together, self.faster = prices, together, faster
        self.runs, self.probes = [], 0

    def _of(self, recipe):
        saved = error = 0.0
        skipped = [0.0] * LAYERS
        for group in recipe.groups:
            for layer in group.select([str(i) for i in range(LAYERS)]):
                one = self.prices[round(getattr(group.policy, "kv_density", -1.0), 2)][layer]
                saved, error = saved + one[0], error + one[1]
                skipped[layer] = 1.0
        return saved, error, skipped

    def run(self, recipe, useless):
        saved, error, skipped = self._of(recipe)
        if len(recipe.groups) > 1 or 0 < sum(skipped) < LAYERS:
            saved, error = saved * self.faster, error * self.together
        levels, apart, seconds = [], [], 10.0 - saved
        for level in (40.0, 38.0):
            levels.append(level - 10 * np.log10(1 + error))
            apart.append(300.0 if error == 0 else level - 10 * np.log10(error))
            if useless(levels, seconds):
                break
        self.runs.append((len(levels), recipe))
        return sparse.Found(levels, apart, seconds, skipped)

    def apart(self, recipe):
        self.probes += 1
        return 40.0 - 10 * np.log10(max(self._of(recipe)[1], 1e-12))


SLOW, CHEAP, DEAR = (-0.1, 0.0), (0.3, 0.02), (0.3, 1.0)
KINDS = sparse.OPTIONS[0], sparse.OPTIONS[1]  # densities 0.5 and 0.25


def test_layers_get_the_kind_that_suits_them():
    """Dense where any kind is dear, the sparser where it is cheap; as predicted, so it ends."""
    prices = {
        0.5: [(0.2, 0.01)] * 4 + [(0.2, 2.0)] * 2,
        0.25: [CHEAP] * 2 + [(0.3, 3.0)] * 4,
    }
    measure = Layers(prices)
    found = sparse.spend(measure, PLAN, LAYERS, 2.0, KINDS)
    chosen = {g["policy"]["kv_density"]: g["layers"] for g in found.chosen.groups}
    assert chosen == {0.25: "0:2", 0.5: "2:4"}
    assert found.chosen.surplus == pytest.approx(found.chosen.predicted_db, abs=0.05)
    assert found.chosen.surplus == pytest.approx(surplus(2.0, 1.0, 0.06))
    assert measure.probes <= 32 and len(found.tried) == 3
    assert sparse.Spent.load(json.loads(json.dumps(found.to_dict()))) == found
    words = found.chosen.words
    assert "topk 0.5 in layers 2:4; topk 0.25, 4 means a block in layers 0:2: +1.000 s" in words
    assert "in all layers: " in found.tried[0].words
    assert "topk 0.25, 4 means a block: 0:1 0.02, 1:2 0.02, 2:3 3, " in found.by_layer


def test_what_loses_more_than_predicted_is_cut_back():
    """Layers that lose most by second go first; the best that was measured stays."""
    prices = {0.5: [(0.3, 0.02 * 3**layer) for layer in range(LAYERS)]}
    measure = Layers(prices, together=4.0)
    found = sparse.spend(measure, PLAN, LAYERS, 2.0, KINDS[:1])
    layers = [each.groups[0]["layers"] for each in found.tried[1:]]
    stops = [int(each.split(":")[1]) for each in layers]
    assert len(stops) > 1 and stops == sorted(stops, reverse=True)
    assert found.chosen == max(found.tried, key=lambda each: each.surplus)
    slow = sparse.spend(Layers(prices, faster=0.0), PLAN, LAYERS, 2.0, KINDS[:1])
    assert slow.chosen is None  # it saves time in all layers alone, and is too dear there


def test_what_cannot_pay_ends_early():
    """No kind saves time, or none could pay in any layers: the rest is not measured."""
    measure = Layers({0.5: [SLOW] * LAYERS, 0.25: [SLOW] * LAYERS, -1.0: [SLOW] * LAYERS})
    found = sparse.spend(measure, PLAN, LAYERS, 2.0)
    assert found.chosen is None and measure.probes == 0 and len(found.tried) == sparse.FAMILIES
    assert [prompts for prompts, _ in measure.runs] == [2, 1, 1, 1, 1]
    measure = Layers({0.5: [DEAR] * LAYERS})
    found = sparse.spend(measure, PLAN, LAYERS, 0.5, KINDS[:1])
    assert found.chosen is None and measure.probes == 0
    dear = Layers({0.5: [(0.3, 100.0)] * LAYERS})  # far beyond any hope: one prompt says so
    assert not sparse.spend(dear, PLAN, LAYERS, 2.0, KINDS[:1]).chosen
    assert [prompts for prompts, _ in dear.runs] == [2, 1]
    all_alone = Layers({0.5: [CHEAP] * LAYERS})
    found = sparse.spend(all_alone, PLAN, LAYERS, 2.0, KINDS[:1], layer_runs=0)
    assert found.chosen.groups[0]["layers"] == ":" and all_alone.probes == 0


def test_tokens_go_in_the_model_s_order_where_nobody_knows_another():
    """A model whose frames, rows and columns nobody knows refuses another order."""

    class Raster(Layers):
        def run(self, recipe, useless):
            if recipe.sparse.token_order != "raster":
                raise NotImplementedError("token_order")
            return super().run(recipe, useless)

    prices = {0.5: [CHEAP] * LAYERS}
    for kind, order in ((Layers, "hilbert"), (Raster, "raster")):
        found = sparse.spend(kind(prices), PLAN, LAYERS, 2.0, KINDS[:1], order="hilbert")
        assert sparse.sparsely(PLAN, found.chosen.groups).sparse.token_order == order
    assert sparse.sparsely(PLAN, ()) == PLAN


@pytest.mark.parametrize("option", sparse.OPTIONS)
def test_what_is_tried_of_sparse_attention_is_a_recipe(option):
    found = sparse.sparsely(
        PLAN, sparse.groups_of((0, None, 0), [(0, 2), (2, 3), (3, 6)], [option])
    )
    assert found.at_output and found.groups[0].sparse.in_computed
    assert found.groups[0].layers == ("0:2", "3:6")
    whole = sparse.groups_of((0, 0), [(0, 2), (2, 6)], [option])
    assert whole[0]["layers"] == ":" and sparse.in_short(whole[0])
