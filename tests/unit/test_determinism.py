"""docs/determinism.md, on the CPU in fp32: tests/gpu/test_determinism_gpu.py has what needs a card.

Steps as recorded calls are tested in test_graphs.py, compiled models in test_changes.py, ranks in
test_parallel.py, a server's batches in test_serve.py.
"""

from pathlib import Path

import pytest
import torch
from guide import BAR_TRITON, run

import flashomni
from determinism import RECIPES, digest, pictures, pipeline

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-5  # of pixels in [0, 1], in fp32: the stock pipeline's own batches differ by 1e-6
ELSEWHERE = """
import flashomni
from determinism import RECIPES, digest, pictures, pipeline
from flashomni.kernels import refusals
from flashomni.lab import doctor

pipe = pipeline()
for name in ("balanced", "tiles"):
    with flashomni.accelerate(pipe, RECIPES[name]) as engine:
        print(name, digest(pictures(pipe)), sep=": ")
        assert "no attention kernel" not in str(engine.report())
why = refusals("attention")
assert set(why) == {"portable", "sm90", "sdpa"}, why
assert why["portable"].startswith("cannot be imported: needs Triton, which is not installed")
assert "needs Triton, which is not installed" in doctor.text()
assert "triton" not in sys.modules
"""


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def stock(pipe):
    """Of a batch of two, and of its first alone."""
    return pictures(pipe, (1, 2)), pictures(pipe)


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_gives_the_same_picture(pipe, stock, name):
    """Again, behind another picture, and with an engine put on anew: the same bits."""
    with flashomni.accelerate(pipe, RECIPES[name]) as engine:
        first = pictures(pipe)
        skipped = engine.report().flops_skipped
        other = pictures(pipe, (2,))
        assert torch.equal(pictures(pipe), first)
    with flashomni.accelerate(pipe, RECIPES[name]):
        assert torch.equal(pictures(pipe), first)
    assert not torch.equal(first, other)
    assert skipped > 0 and not torch.equal(first, stock[1])  # the recipe did something
    assert torch.equal(pictures(pipe), stock[1])


@pytest.mark.slow
def test_it_is_the_same_in_another_process(pipe, monkeypatch):
    """Nothing depends on the order of a set or on an address, nor, on the CPU, on Triton.

    Without which `doctor` says what it needs, and everything but its kernels runs.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    done = run("-c", f"{BAR_TRITON}\n{ELSEWHERE}", path=[ROOT / "tests"])
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ") for line in done.stdout.splitlines())
    assert set(told) == {"balanced", "tiles"}
    for name in told:
        with flashomni.accelerate(pipe, RECIPES[name]):
            assert told[name] == digest(pictures(pipe)), name


@pytest.mark.parametrize("name", ["balanced", "tiles", "key blocks"])
def test_a_batch_differs_from_one_by_rounding_alone(pipe, stock, name):
    """Matrix products of a batch are summed in another order; nothing else depends on it.

    A schedule that looks at tensors sees the whole batch: it is left out, and the page says so.
    """
    assert (stock[0][:1] - stock[1]).abs().max() <= ROUNDING
    with flashomni.accelerate(pipe, RECIPES[name]):
        both, alone = pictures(pipe, (1, 2)), pictures(pipe)
    assert (both[:1] - alone).abs().max() <= ROUNDING
    assert (both[0] - both[1]).abs().max() > 100 * ROUNDING  # of two pictures
