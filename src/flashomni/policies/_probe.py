"""What a mask does to attention, measured on a few of the query rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni.policies._places import Places
from flashomni.policies._site import AttentionSite


def spread_rows(queries: Places, count: int) -> Tensor:
    """Positions of up to ``count`` generated query tokens, spread evenly: int64 ``[R]``."""
    count = min(count, queries.count)
    wanted = torch.arange(count, device=queries.index.device) * 2 + 1
    return queries.positions()[wanted * queries.count // (2 * count)]


def errors(site: AttentionSite, rows: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Squared error of attention under each mask, relative to its size: fp32 ``[masks, B, H]``.

    Args:
        site: whose attention it is.
        rows: int64 ``[R]``, the query rows to look at.
        masks: bool ``[R, N]`` each, true where a row visits a key.
    """
    q, k, v = site.q[:, rows] * site.softmax_scale, site.k, site.v
    batch, count, num_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)  # GQA: heads of a key head, rows
    score = (q @ k.permute(0, 2, 3, 1)).float()
    score = score.view(batch, kv_heads, num_heads // kv_heads, count, -1)
    if site.grid.kv_len is not None:
        key = torch.arange(k.shape[1], device=k.device)
        padding = key >= site.grid.kv_len[:, None]
        score = score.masked_fill(padding[:, None, None, None], -torch.inf)
    values = v.transpose(1, 2)[:, :, None]
    full = (score.softmax(-1).to(v.dtype) @ values).float()
    size = full.square().sum((-1, -2)).clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for mask in masks:
        # A row whose keys are all masked or padding gives nothing: its error is its size.
        share = score.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        some = (share.to(v.dtype) @ values).float()
        found.append(((some - full).square().sum((-1, -2)) / size).flatten(1))
    return torch.stack(found)
