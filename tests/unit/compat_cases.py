"""What the tests of the authors' API share: their packing by numpy, and the allowed error."""

import numpy as np
import pytest
import torch

FLOOR = 8 * torch.finfo(torch.float32).eps  # torch may hit the exact value by luck
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def starts(counts, device="cpu"):
    """int32 indptr of runs of these lengths."""
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device)


def blocks(length, block):
    return -(-length // block)


def numpy_packed(masks, device="cpu"):
    """Each request packed by numpy: bytes and where each request starts."""
    rows = [np.packbits(mask.flatten().cpu().numpy(), bitorder="little") for mask in masks]
    packed = torch.from_numpy(np.concatenate(rows)).to(device)
    return packed, starts([len(row) for row in rows], device)


def close(got, exact, plain, where=None):
    """Error at most twice that of the same sum in the dtype of ``plain``."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    error, allowed = (got.double() - exact).abs(), (plain.double() - exact).abs()
    if where is not None:
        error, allowed = error[where], allowed[where]
    assert error.max() <= 2 * allowed.max() + FLOOR * exact.abs().max()
