"""Distances of pictures: what each of them sees, and why one cannot be measured."""

import math

import pytest
import torch

from flashomni.lab import metrics


def test_lpips_says_why_it_cannot_run(monkeypatch, tmp_path):
    """Without its weights: a reason, an error, never another metric in its place."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.why_no_lpips() is not None
    picture = torch.rand(1, 3, 64, 64)
    with pytest.raises(NotImplementedError, match="LPIPS cannot be measured: torchvision"):
        metrics.lpips(picture, picture)


def test_temporal_psnr_sees_flicker_only():
    """A constant error in all frames is no flicker; one that alternates is."""
    clip = torch.rand(6, 3, 16, 16) * 0.5
    assert metrics.temporal_psnr(clip, clip + 0.25) > 100
    assert metrics.temporal_psnr(clip, clip) == math.inf
    sign = torch.tensor([0.0, 1.0]).repeat(3).view(6, 1, 1, 1)
    assert metrics.temporal_psnr(clip, clip + 0.1 * sign) == pytest.approx(20.0, abs=0.01)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        metrics.temporal_psnr(clip[:1], clip[:1])
