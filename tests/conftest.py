"""Seeds, devices, and uninitialised memory that shows: every test starts from the same state."""

import pytest
import torch

from flashomni.symbols import Grid, Symbols


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Fixed seeds; memory from torch.empty is NaN, so that nothing may depend on it."""
    torch.manual_seed(0)
    fill, mode = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_deterministic_debug_mode(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


def device_for(backend):
    """Where a backend's tensors live in these tests."""
    on_gpu = torch.cuda.is_available() and backend not in ("cpu", "reference")
    return torch.device("cuda" if on_gpu else "cpu")


def random_symbols(grid, batch, num_heads, q_density=0.6, kv_density=0.4, **options):
    """Independent random bits, invariants enforced."""
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    q_mask = torch.rand(batch, num_heads, rows) < q_density
    kv_mask = torch.rand(batch, num_heads, rows, columns) < kv_density
    return Symbols.pack(q_mask, kv_mask, grid, **options)


def token_masks(symbols):
    """``(rows [B, H, M], pairs [B, H, M, N])`` of the symbols, kv_len included."""
    grid = symbols.grid
    rows = symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., : grid.seqlen_q]
    pairs = symbols.kv_mask().repeat_interleave(grid.block_m, -2)
    pairs = pairs.repeat_interleave(grid.block_n, -1)[..., : grid.seqlen_q, : grid.seqlen_kv]
    if grid.kv_len is not None:
        position = torch.arange(grid.seqlen_kv, device=pairs.device)
        pairs = pairs & (position < grid.kv_len[:, None, None, None])
    return rows, pairs


__all__ = ["Grid", "device_for", "random_symbols", "token_masks"]
