"""docs/determinism.md on a card: two runs, a new engine, CUDA graphs or none: the same bits."""

import pytest
import torch

import flashomni
from determinism import RECIPES, pictures, pipeline

pytestmark = pytest.mark.gpu
REPEATED = 4  # the third generation of a kind replays graphs


@pytest.fixture(scope="module", params=[(64, torch.float32), (128, torch.bfloat16)], ids=str)
def pipe(request):
    """Heads for the portable kernels in fp32, and for those of a Hopper card."""
    head_dim, dtype = request.param
    return pipeline("cuda", dtype, head_dim)


def generations(pipe, name, graphs):
    """The same picture several times, how many calls were replayed, and what was noted."""
    found, others = [], []
    with flashomni.accelerate(pipe, RECIPES[name], graphs=graphs) as engine:
        for _ in range(REPEATED):
            found.append(pictures(pipe, size=256))
            # Small tensors take what was let go: what a recording reads and does not hold is lost.
            others += [torch.zeros((), device="cuda") for _ in range(1000)]
        return found, engine._runtime.graphs.replays, engine.report()


def told(report):
    """What a report says of the steps, but for times and bytes."""
    beside = {"seconds", "cache_bytes", "cache_bytes_host", "allocated_bytes"}
    return [{k: v for k, v in step.items() if k not in beside} for step in report.steps]


@pytest.mark.parametrize("name", RECIPES)
def test_a_picture_is_the_same_with_graphs_and_without(pipe, name):
    """And in every run of one engine; only what an anchored softmax learned may change a bit."""
    plain, _, report = generations(pipe, name, False)
    again, _, _ = generations(pipe, name, False)
    recorded, replays, noted = generations(pipe, name, True)
    assert report.flops_skipped > 0
    assert told(noted) == told(report)
    for a, b, c in zip(plain, again, recorded, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    if not any("did" in note and "tiles" in note and "again" in note for note in report.notes):
        assert all(torch.equal(picture, plain[0]) for picture in plain)
    assert replays > 0 or any("no CUDA graphs" in note for note in noted.notes)


def test_torch_needs_no_deterministic_mode(pipe):
    """No op of ours adds in an order that changes from run to run."""
    torch.use_deterministic_algorithms(False)  # conftest puts it back
    plain, _, _ = generations(pipe, "flashomni", False)
    again, _, _ = generations(pipe, "flashomni", False)
    assert all(map(torch.equal, plain, again))
