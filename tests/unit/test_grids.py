"""What a grid's constants cost is paid once, and no call gets those of another geometry."""

import pytest
import torch

import flashomni
from conftest import call
from flashomni.engine.grids import MAX_GRIDS, Grids
from flashomni.models import adapters
from flashomni.policies import make_policy

CPU = torch.device("cpu")
SIZES = (130, (0, 17), (32, 48), ())


def lengths(*values, device=CPU):
    return torch.tensor(values, dtype=torch.int32, device=device)


def test_equal_sizes_share_what_is_made_once():
    """Whatever the valid lengths are: those are of each call."""
    get, one, other = Grids().on(CPU), lengths(130), lengths(99, 98)
    first, second = get(*SIZES, one), get(*SIZES, other)
    assert first.kv_len is one and second.kv_len is other and get(*SIZES, None).kv_len is None
    for name in ("text_q_bits", "text_kv_bits", "all_q_bits", "given_kv_mask"):
        assert getattr(second, name)(CPU) is getattr(first, name)(CPU)


@pytest.mark.parametrize(
    "sizes",
    [
        (131, (0, 17), (32, 48), ()),
        (130, (113, 130), (32, 48), ()),
        (130, (0, 17), (48, 48), ()),
        (130, (0, 17), (32, 48), (("shape", (1, 1, 113)),)),
        (130, (0, 17), (32, 48), (("spans", (("text", 100, 130),)),)),
    ],
    ids=str,
)
def test_other_sizes_share_nothing(sizes):
    get = Grids().on(CPU)
    first, second = get(*SIZES, None), get(*sizes, None)
    first.text_q_bits(CPU)
    assert first != second and not second._constants


def test_few_are_kept():
    """The ones that were used last."""
    grids = Grids()
    get = grids.on(CPU)
    for seqlen in range(100, 100 + 2 * MAX_GRIDS):
        kept = get(*SIZES, None)
        get(seqlen, *SIZES[1:], None)
    assert get(*SIZES, None)._constants is kept._constants
    assert len(grids._known) == MAX_GRIDS


def test_apart():
    """A grid of its own finds what is there, and keeps what it makes."""
    grid = Grids().on(CPU)(*SIZES, None)
    bits = grid.text_q_bits(CPU)
    other = grid.with_kv_len(None, apart=True)
    assert other.text_q_bits(CPU) is bits
    other.text_kv_bits(CPU)
    assert len(grid._constants) < len(other._constants)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.slow
def test_every_step_finds_what_the_first_has_made(monkeypatch):
    """In all layers, branches and generations of one geometry."""
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    seen, policy = [], type(make_policy("topk"))
    plain = policy.__call__
    monkeypatch.setattr(
        policy, "__call__", lambda self, site: (seen.append(site.grid), plain(self, site))[1]
    )
    recipe = flashomni.Recipe.of(make_policy("topk"), warmup=0.0, interval=2)
    with flashomni.accelerate(model, recipe) as engine:
        for _ in range(2):
            for step in range(4):
                for branch in ("cond", "uncond"):
                    engine.step(step, 4, branch)
                    call(model, inputs)
    assert len(seen) > 8 and len({id(grid._constants) for grid in seen}) == 1
    assert seen[0]._constants


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_capture_leaves_nothing_behind():
    """It finds what was made before; what it makes itself is not computed yet."""
    device, stream = torch.device("cuda"), torch.cuda.Stream()
    grids, graph = Grids(), torch.cuda.CUDAGraph()
    get = grids.on(device)
    bits = get(*SIZES, None).text_q_bits(device)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = get(*SIZES, None)
        assert captured.text_q_bits(device) is bits
        captured.all_q_bits(device)
        get(131, *SIZES[1:], None).all_q_bits(device)
    assert len(grids._known) == 1
    after = get(*SIZES, None)
    assert len(after._constants) < len(captured._constants)
    assert after.all_q_bits(device).tolist() == [31]
    with torch.cuda.stream(stream):
        assert grids.on(device)(*SIZES, None).text_q_bits(device) is not bits
