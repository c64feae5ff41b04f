"""What policies share whose choice depends on positions alone."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.policies._site import AttentionSite
from flashomni.symbols import Grid, Symbols


def shared_symbols(kv_mask: Tensor, site: AttentionSite) -> Symbols:
    """Symbols of one mask for the whole batch and all heads, every tile computed.

    Text and reference rows visit everything, and their columns are visited by every row: they have
    no place among the generated tokens.

    Args:
        kv_mask: bool ``[Mb, Nb]``.
        site: whose batch and heads share it.
    """
    grid = site.grid
    kv_mask = visits_given(kv_mask, grid)
    q_mask = torch.ones_like(kv_mask[:, 0])
    # One row of bits is stored for the whole batch and all heads.
    shared = Symbols.pack(q_mask[None, None], kv_mask[None, None], grid)
    return shared.expand(site.q.shape[0], site.q.shape[2])


def visits_given(kv_mask: Tensor, grid: Grid) -> Tensor:
    """The mask ``[..., Mb, Nb]`` with text and reference rows and columns visited."""
    device = kv_mask.device
    return kv_mask | grid.given_q_mask(device)[:, None] | grid.given_kv_mask(device)
