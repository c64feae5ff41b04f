"""What `flashomni eval` can be asked to compare: the names of methods, and peers."""

import importlib.util

import pytest
import torch
from small_pipes import small

from flashomni.engine.recordable import look_at
from flashomni.lab import zoo
from flashomni.lab.fidelity import parse_method
from flashomni.lab.fidelity.flops import count_flops
from flashomni.lab.fidelity.methods import DEFAULTS
from flashomni.lab.fidelity.peers import PEERS
from flashomni.lab.generation import Generation

# Settings under which each peer changes a picture of eight steps.
AGGRESSIVE = {
    "diffusers.taylorseer": "cache_interval=3",
    "diffusers.first_block": "threshold=10",
    "diffusers.pab": "spatial_attention_block_skip_range=3",
    "diffusers.mag": "threshold=10,retention_ratio=0.1",
    "cache-dit": "Fn_compute_blocks=1,residual_diff_threshold=10,max_warmup_steps=2",
}


@pytest.fixture(scope="module")
def loaded():
    return small()


@pytest.fixture(scope="module", params=zoo.RANDOM)
def either(request):
    return small(request.param)


def test_every_default_method_has_a_meaning():
    """The default set parses; names are unique; all families are there."""
    methods = [parse_method(name) for name in DEFAULTS]
    assert len({method.name for method in methods}) == len(methods)
    assert {method.family for method in methods} == {"presets", "recipes", "stock", "peers"}


def test_a_method_is_what_it_says():
    """Specs tell methods apart: equal pictures only from equal specs."""
    assert parse_method("steps=14").steps == 14
    assert parse_method("balanced").spec["recipe"]["name"] == "balanced"
    assert parse_method("balanced:interval=3").spec["recipe"]["schedule"]["interval"] == 3
    assert parse_method("fora").spec != parse_method("fora:interval=9").spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps=0", "steps must be a positive integer, got 'steps=0'"),
        ("steps=many", "steps must be a positive integer"),
        ("ludicrous", "recipe must be a preset"),
        ("flashomni:speed=9", "settings of flashomni.* are .*tau_q.*; got 'speed'"),
        ("balanced:interval", "settings must be key=value"),
        ("balanced:interval=2,interval=3", "interval is given twice"),
        ("balanced:interval=0", "interval must be an integer from 1"),
        ("diffusers.mag:threshold", "settings must be key=value"),
    ],
)
def test_wrong_methods(text, message):
    """A sentence that names what was given and what is allowed."""
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_peer_acts_and_is_taken_off(either, name):
    """While attached it changes the result; afterwards the stock pipeline is back, bit for bit."""
    if name == "cache-dit" and importlib.util.find_spec("cache_dit") is None:
        with pytest.raises(NotImplementedError, match="cache-dit cannot be imported"):
            parse_method(name)
        pytest.skip("cache-dit is not installed")
    generation = Generation(either, None, 0)
    stock, _ = generation.run(lambda step, total: None)
    method = parse_method(f"{name}:{AGGRESSIVE[name]}")
    method.prepare(either.pipe, 8, lambda: generation.run(lambda step, total: None))
    for _ in range(2):  # state of one generation must not reach the next
        with method.attach(either.pipe, 8):
            changed, _ = generation.run(lambda step, total: None)
        assert not torch.equal(changed, stock)
        again, _ = generation.run(lambda step, total: None)
        assert torch.equal(again, stock)
    assert look_at(either.pipe.transformer, lambda _: False)[0] == ""  # graphs may be recorded


def test_a_peer_refuses_settings_it_does_not_have(loaded):
    """The peer's own configuration decides."""
    method = parse_method("diffusers.first_block:sharpness=1")
    refused = pytest.raises(ValueError, match=r"FirstBlockCacheConfig: .*sharpness")
    with refused, method.attach(loaded.pipe, 8):
        pass


def test_flops_of_the_stock_model_are_those_of_the_engine(either):
    """Two independent counts: torch's also sees embedders and text refiner, outside the blocks."""
    generation = Generation(either, None, 0)
    _, _, summary = generation.accelerated("lossless", lambda step, total: None)
    share = sum(summary.flops_dense.values()) / count_flops(generation)
    assert 0.85 < share < 1.0
