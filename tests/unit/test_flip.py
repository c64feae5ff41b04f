"""FLIP: what is measured, in an evaluation too, and why not where it cannot be."""

import importlib.util

import pytest
import torch

from flashomni.lab import metrics

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flip_evaluator") is None, reason="needs flip-evaluator"
)


def test_equal_pictures_do_not_differ():
    picture = torch.rand(2, 3, 24, 33)
    assert metrics.flip(picture, picture) == 0.0
    assert metrics.flip_map(picture, picture).shape == (2, 24, 33)


def test_black_and_white_differ_as_much_as_can_be():
    black, white = torch.zeros(1, 3, 24, 33), torch.ones(1, 3, 24, 33)
    assert metrics.flip(black, white) > 0.9


def test_it_grows_with_the_error_and_shows_where_it_is():
    """A patch of one frame: that frame alone, there above all."""
    picture = torch.rand(2, 3, 32, 48) * 0.5 + 0.25
    values = []
    for size in (0.05, 0.2):
        other = picture.clone()
        other[1, :, 8:24, 8:24] += size
        found = metrics.flip_map(picture, other)
        assert not found[0].any() and found.max() <= 1
        assert found[1, 12:20, 12:20].mean() > 10 * found[1, :, 40:].mean()
        values.append(metrics.flip(picture, other))
    assert 0 < values[0] < values[1]


def test_any_float_dtype_and_layout():
    """As the package itself has it of the same numbers."""
    from flip_evaluator import evaluate

    one, other = torch.rand(2, 1, 3, 20, 20).bfloat16()
    pair = (x[0].float().permute(1, 2, 0).contiguous().numpy() for x in (one, other))
    expected = float(evaluate(*pair, "LDR")[1])
    assert metrics.flip(one, other) == pytest.approx(expected, rel=1e-5)
    assert metrics.flip(one.mT.contiguous().mT, other) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.full((1, 3, 8, 8), 2.0)])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="reference must"):
        metrics.flip(bad, bad)


def test_it_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert metrics.why_no_flip() == "flip-evaluator is not installed"
    picture = torch.rand(1, 3, 16, 16)
    with pytest.raises(NotImplementedError, match="FLIP cannot be measured: flip-evaluator"):
        metrics.flip(picture, picture)
