"""DraftAttention (arXiv 2505.14708): attention of a low-resolution draft says what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, check_range, parse_extent, policy
from flashomni.policies._places import Places, places, shape_of
from flashomni.policies._static import visits_given
from flashomni.symbols import Symbols


@policy("draft")
@dataclass(frozen=True)
class Draft(Policy):
    """Visit the block pairs with the most attention between average-pooled patches of frames.

    Each head keeps the same share of all pairs, wherever they lie: rows differ in how many they
    get. The paper moves the tokens of a patch together, so that a block is a patch; where it is
    not, a pair of blocks has the mass of its patches by the tokens that it holds of them. Text and
    reference rows visit everything, and everybody visits theirs. Without a shape the patches lie
    along the sequence.

    Args:
        density: share of the pairs of blocks without text that are kept in each head.
        pool: rows and columns of a patch, ``"8x16"`` as in the paper.

    Raises:
        ValueError: a setting is out of range; or, when called, tokens are not in raster order and
            nobody says their shape.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "density"

    density: float = 0.25
    pool: str = "8x16"

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0, 1.0)
        parse_extent("pool", self.pool, 2)

    def wants_shape(self) -> bool:
        return True

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        high, wide = parse_extent("pool", self.pool, 2)
        shape = shape_of(grid, self.name)
        if grid.shape is None:
            high, wide = 1, high * wide
        frames, across, down = shape[0], -(-shape[2] // wide), -(-shape[1] // high)
        patches = frames * down * across
        queries, keys = places(grid, shape, device)
        parts = []
        for each in (queries, keys):
            t, h, w = each.coordinates()
            parts.append((t * down + h // high) * across + w // wide)
        q_draft, _ = _pooled(site.q, parts[0], queries, patches)
        k_draft, k_size = _pooled(site.k, parts[1], keys, patches)
        k_draft = k_draft.repeat_interleave(site.q.shape[2] // site.k.shape[2], dim=1)
        score = (q_draft * site.softmax_scale) @ k_draft.mT
        attention = score.masked_fill(k_size == 0, -torch.inf).softmax(-1)
        rows = queries.held(parts[0], patches, grid.block_m)
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=1)
        columns = keys.held(parts[1], patches, grid.block_n) / k_size.clamp(min=1)
        mass = rows @ attention @ columns.mT  # [B, H, Mb, Nb]
        kv_mask = visits_given(self._heaviest(mass, site), grid)
        return Symbols.pack(torch.ones_like(kv_mask[..., 0]), kv_mask, grid)

    def _heaviest(self, mass: Tensor, site: AttentionSite) -> Tensor:
        """The pairs of each head that make up ``density`` of those without given tokens."""
        device = mass.device
        free_rows = ~site.grid.given_q_mask(device)
        free = free_rows[:, None] & ~site.grid.given_kv_mask(device)
        mass = mass.masked_fill(~free, -1.0)
        order = mass.flatten(-2).argsort(dim=-1, descending=True, stable=True)
        rank = torch.arange(order.shape[-1], device=device)
        kept = (rank < (self.density * free.sum()).ceil()).expand_as(order)
        return torch.zeros_like(kept).scatter(-1, order, kept).view_as(mass)


def _pooled(x: Tensor, part: Tensor, tokens: Places, parts: int) -> tuple[Tensor, Tensor]:
    """Mean of the generated tokens of each part, fp32 ``[B, H, parts, D]``, and their number."""
    batch, _, num_heads, head_dim = x.shape
    weight = tokens.generated.float()
    size = torch.zeros(parts, device=x.device).scatter_add_(0, part, weight)
    total = x.new_zeros((batch, parts, num_heads, head_dim), dtype=torch.float32)
    total = total.index_add(1, part, x.float() * weight[:, None, None])
    return (total / size.clamp(min=1)[:, None, None]).transpose(1, 2), size
