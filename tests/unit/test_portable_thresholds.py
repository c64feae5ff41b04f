"""The thresholds that Triton kernels find on rows of masses, bit by bit: what sorting gives."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl

from conftest import device_for
from flashomni.kernels.common import portable
from flashomni.symbols.choice import _kernels
from flashomni.symbols.choice.op import heaviest, low_mass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.triton,
    pytest.mark.skipif(bool(portable.available()), reason="; ".join(portable.available())),
]
DEVICE = device_for("portable")
TAUS = [0.0, 1e-6, 0.05, 0.5, 0.95, 1.0]
KINDS = ["flat", "peaked", "ties", "equal", "zeros", "huge", "no mass"]


def scalar(value):
    return torch.full((), value, device=DEVICE)


@triton.jit
def choose_kernel(
    mass, tau, out, columns, count, COUNTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column = tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None]
    real = (row >= 0) & (column < columns)
    value = tl.load(mass + row * columns + column, mask=real, other=0.0)
    taken = _kernels.most(value, real, count) if COUNTS else _kernels.heavy(value, tl.load(tau))
    tl.store(out + row * columns + column, taken.to(tl.int8), mask=real)


def chosen(mass, tau=0.0, count=None):
    """What the kernels choose of ``[4, columns]``, as bool."""
    out = torch.full(mass.shape, 7, dtype=torch.int8, device=DEVICE)
    choose_kernel[(1,)](
        mass, scalar(tau), out, mass.shape[1], count or 0, COUNTS=count is not None, ROWS=4,
        COLUMNS=triton.next_power_of_2(mass.shape[1]), num_warps=1,
    )  # fmt: skip
    assert ((out == 0) | (out == 1)).all()
    return out.bool()


def masses(kind, rows, columns):
    """Rows that are not negative: spread out, peaked, full of ties, with zeros, or huge."""
    normal = torch.randn(rows, columns, device=DEVICE)
    return {
        "flat": lambda: (0.1 * normal).softmax(-1),
        "peaked": lambda: (8 * normal).softmax(-1),  # down to denormals and below
        "ties": lambda: normal.abs().mul(2).round() / 16,
        "equal": lambda: torch.full_like(normal, 0.25),
        "zeros": lambda: normal.relu() * (normal < 1),
        "huge": lambda: (normal * 10).exp(),
        "no mass": lambda: torch.zeros_like(normal),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 33, 130])
def test_heavy(kind, columns):
    """Entry for entry the definition, ties included."""
    mass = masses(kind, 4, columns)
    for tau in TAUS:
        assert torch.equal(chosen(mass, tau), ~low_mass(mass, tau)), tau


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 7, 33, 130])
def test_most(kind, columns):
    """Entry for entry the definition; exactly so many; the heaviest, the first among equals."""
    mass = masses(kind, 4, columns)
    for count in {0, 1, columns // 2, columns}:
        got = chosen(mass, count=count)
        assert torch.equal(got, heaviest(mass, count))
        assert (got.sum(-1) == count).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_as_much_as_may_be(kind):
    """At most tau of the mass, and one entry more would be too much (in exact arithmetic)."""
    mass = masses(kind, 4, 65)
    for tau in TAUS:
        kept = chosen(mass, tau)
        for row, keep in zip(mass.double(), kept, strict=True):
            left_out, limit = row[~keep].sum(), scalar(tau).double() * row.sum()
            slack = 1e-12 * row.sum()
            assert left_out <= limit + slack
            if keep.any():
                assert left_out + row[keep].min() > limit - slack
                assert (~keep).sum() == 0 or row[~keep].max() <= row[keep].min()


def test_infinite_mass_wins():
    """`topk` gives text infinite mass: it is taken first, and counts."""
    mass = torch.tensor([[0.5, torch.inf, 0.1, torch.inf, 0.9]], device=DEVICE).repeat(4, 1)
    for count, expected in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4])):
        got = chosen(mass, count=count)[0]
        assert got.nonzero()[:, 0].tolist() == expected
