"""Spans: layers that are cached whole replay together exactly what they added together."""

from dataclasses import dataclass

import pytest
import torch

import flashomni
from conftest import STEPS, call
from flashomni.engine import Recipe
from flashomni.engine.state.cache import Fraction, LayerCache
from flashomni.engine.state.span import Spans
from flashomni.engine.state.storage import Storage
from flashomni.models import find_adapter
from flashomni.policies import POLICIES, make_policy, policy

ONE = torch.ones(1)


def chain(*adds, start=0.0):
    """Streams in front of, between and behind layers that add these numbers."""
    streams = [(torch.full((1, 3, 2), start), torch.full((1, 2, 2), start))]
    for number in adds:
        streams.append(tuple(stream + number for stream in streams[-1]))
    return streams


def update(spans, streams, cached, step=0):
    """One step that records: layers ``cached`` are cached whole from now on."""
    for index in cached:
        spans.record(index, streams[index], streams[index + 1], step)
    spans.finish(step)


def extents(spans):
    return [(span.start, span.stop) for span in spans._current]


@pytest.fixture
def spans():
    return Spans(1, Storage())


def test_neighbours_are_one_span_and_replay_their_sum(spans):
    """The first layer of a span stands in for all; the others hand on what they get."""
    update(spans, chain(1, 2, 4, 8, 16), [0, 1, 3])
    assert extents(spans) == [(0, 2), (3, 4)]
    other = chain(start=5.0)[0]
    behind = spans.replay(0, other, ONE)
    assert [stream.unique().tolist() for stream in behind] == [[8.0], [8.0]]
    assert spans.replay(1, behind, ONE) is behind
    assert spans.replay(2, behind, ONE) is None
    assert spans.replay(3, other, ONE)[0].unique().tolist() == [13.0]
    assert spans.replay(4, other, ONE) is None


def test_a_stream_that_the_model_changes_between_blocks_ends_a_span(spans):
    """A ControlNet adds to a stream after a block: that must not be replayed with the block."""
    first, second = chain(1, 2)[:2], chain(100, 2, start=1.0)[1:]
    spans.record(0, *first, 0)
    spans.record(1, *second, 0)
    spans.finish(0)
    assert extents(spans) == [(0, 1), (1, 2)]
    assert spans.replay(0, first[0], ONE)[0].unique().tolist() == [1.0]


def test_a_stream_that_is_written_to_between_blocks_is_not_kept(spans):
    """In place nobody sees it but by its version: of that step nothing, then block by block."""
    before, between, _ = chain(1, 2)
    spans.record(0, before, between, 0)
    between[0].add_(100)
    spans.record(1, between, tuple(stream + 2 for stream in between), 0)
    assert not spans.finish(0) and extents(spans) == []
    update(spans, chain(1, 2), [0, 1], step=1)
    assert extents(spans) == [(0, 1), (1, 2)]


def test_a_layer_is_cached_whole_up_to_the_threshold():
    """At it too; 0 never does. A number that may be under way is not waited for."""
    cache = LayerCache()
    for known, threshold, expected in ((0.5, 0.5, True), (0.51, 0.5, False), (0.0, 0.0, False)):
        cache.degrade(known, 0, threshold, False)
        assert cache.degraded is expected
    cache.fraction, cache.measured = Fraction(torch.tensor(0.9)), 3
    assert [cache.expected(step, 0.5, hopeful=True) for step in (3, 4, 5)] == [True, True, False]
    assert not cache.expected(4, 0.5, hopeful=False)
    cache.fraction = Fraction(torch.tensor(0.5))
    assert cache.expected(5, 0.5, hopeful=True)


def test_differences_survive_growth_and_end_with_a_split(spans):
    """New layers form a span of their own; a span that is cut loses its history, for it was of
    another quantity."""
    update(spans, chain(1, 2, 4, 8), [0, 1], step=0)
    update(spans, chain(3, 4, 4, 8), [0, 1, 2], step=2)
    assert extents(spans) == [(0, 2), (2, 3)]
    sizes = {span.start: len(span.histories[0]) for span in spans._current}
    assert sizes == {0: 2, 2: 1}
    streams = chain(start=0.0)[0]
    behind = spans.replay(0, streams, torch.tensor([1.0, 1.0]))  # 7, rising by 2 a step
    assert behind[0].unique().tolist() == [9.0]
    update(spans, chain(3, 4, 4, 8), [0, 2, 3], step=4)
    assert extents(spans) == [(0, 1), (2, 3), (3, 4)]
    assert [len(span.histories[0]) for span in spans._current] == [1, 2, 1]


def test_nothing_is_kept_of_layers_that_are_computed_again(spans):
    update(spans, chain(1, 2), [0, 1])
    assert len(spans.tensors()) == 2
    update(spans, chain(1, 2), [], step=1)
    assert spans.tensors() == [] and spans.replay(0, chain()[0], ONE) is None


@policy("alternate")
@dataclass(frozen=True)
class Alternate(type(make_policy("topk"))):
    """Says of half of the layers that little of them is computed; a layer may ask twice."""

    name = "alternate"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "calls", [])

    def known_fraction(self, grid):
        self.calls.append(None)
        return 0.1 if len(self.calls) % 4 < 2 else 0.9


POLICIES.remove("alternate")  # the contract tests are for those that others can ask for


def test_spans_between_computed_layers(no_grad, tiny):
    """Some layers cached whole, some by tile: constant inputs give the outputs of the Update."""
    model, inputs = tiny
    policy = Alternate(q_density=1.0, kv_density=1.0)
    recipe = Recipe.of(policy, interval=3, warmup=0.0, order=1, degrade_below=0.5)
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(3):
            engine.step(step, STEPS)
            torch.testing.assert_close(call(model, inputs), stock, atol=2e-5, rtol=1e-4)
        kinds = [set(step["layer_kinds"]) for step in engine.report().steps]
    assert kinds == [{"update"}, {"dispatch", "bypass"}, {"dispatch", "bypass"}]


def test_a_step_that_raises_starts_its_branch_afresh(no_grad, tiny):
    """Half an Update leaves half of the spans: the next Dispatch must not replay them."""
    model, inputs = tiny
    with flashomni.accelerate(model, "fora:interval=3,warmup=0") as engine:
        last = find_adapter(model).sites(model)[-1].block
        handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
        engine.step(0, STEPS)
        with pytest.raises(ZeroDivisionError):
            call(model, inputs)
        handle.remove()
        engine.step(1, STEPS)
        stock_like = call(model, inputs)
        assert engine.report().steps[-1]["kind"] == "update"
    torch.testing.assert_close(stock_like, call(model, inputs), atol=1e-5, rtol=1e-4)
