"""XAttention (arXiv 2503.16428): blocks are scored by the sums of their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashomni.policies import AttentionSite, Policy, check_range, policy
from flashomni.policies._static import visits_given
from flashomni.symbols import Symbols
from flashomni.symbols.choice.op import low_mass

CHUNK = 1 << 26  # entries of the strided map that exist at a time


@policy("xattention")
@dataclass(frozen=True)
class XAttention(Policy):
    """Visit the fewest key blocks that hold ``mass`` of each row, measured along antidiagonals.

    A block of scores is cut into squares of ``stride`` tokens, of which one antidiagonal each is
    summed: every query and every key takes part. The softmax of these sums over a row of squares,
    summed over the block, is its share. Text and reference rows visit everything, and everybody
    visits theirs; the paper, made for language models, has no such exception.

    Args:
        mass: share of the attention to keep (tau of the paper).
        stride: side of a square: 1, 2, 4, 8 or 16 tokens.

    Raises:
        ValueError: a setting is out of range.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "mass"

    mass: float = 0.9
    stride: int = 8

    def __post_init__(self) -> None:
        check_range("mass", self.mass, 0.0, 1.0)
        whole = isinstance(self.stride, int) and not isinstance(self.stride, bool)
        if not whole or self.stride not in (1, 2, 4, 8, 16):  # it has to divide every block
            raise ValueError(f"stride must be 1, 2, 4, 8 or 16, got {self.stride!r}")

    def __call__(self, site: AttentionSite) -> Symbols:
        kv_mask = ~low_mass(self.shares(site), 1.0 - self.mass)
        kv_mask = visits_given(kv_mask, site.grid)
        return Symbols.pack(torch.ones_like(kv_mask[..., 0]), kv_mask, site.grid)

    def shares(self, site: AttentionSite) -> Tensor:
        """Attention that each query block gives to each key block: fp32 ``[B, H, Mb, Nb]``."""
        grid, stride = site.grid, self.stride
        # Scaled first: sums of so many products would overflow in fp16.
        q = _in_squares(site.q * (site.softmax_scale / stride), stride, flip=True)
        k = _in_squares(_valid(site), stride, flip=False)
        k = k.repeat_interleave(site.q.shape[2] // site.k.shape[2], dim=1)
        batch, num_heads, rows, _ = q.shape
        columns = k.shape[2]
        hidden = torch.zeros((), dtype=torch.bool, device=q.device)
        if grid.kv_len is not None:
            first = torch.arange(columns, device=q.device) * stride
            hidden = (first >= grid.kv_len[:, None])[:, None, None]
        across, down = grid.block_n // stride, grid.block_m // stride
        width, blocks = grid.num_kv_blocks * across, grid.num_q_blocks
        step = max(CHUNK // (batch * num_heads * columns * down), 1) * down
        found = []
        for start in range(0, rows, step):
            some = q[:, :, start : start + step]
            score = (some @ k.mT).float()
            share = score.masked_fill(hidden, -torch.inf).softmax(-1)
            tail = -some.shape[2] % down
            share = pad(share, (0, width - columns, 0, tail)).unflatten(-1, (-1, across)).sum(-1)
            found.append(share.unflatten(2, (-1, down)).sum(3))
        share = torch.cat(found, 2)
        assert share.shape[2] == blocks, "one row of shares a query block"
        return share


def _valid(site: AttentionSite) -> Tensor:
    """The keys, 0 where they are padding: a square may hold some of either."""
    kv_len = site.grid.kv_len
    if kv_len is None:
        return site.k
    padding = torch.arange(site.k.shape[1], device=site.k.device) >= kv_len[:, None]
    return site.k.masked_fill(padding[..., None, None], 0.0)


def _in_squares(x: Tensor, stride: int, flip: bool) -> Tensor:
    """``stride`` tokens in a row as one: ``[B, H, ceil(S / stride), stride * D]``.

    The product of two of them, one flipped, is the sum of an antidiagonal of their scores. Tokens
    behind the end are 0 and add nothing.
    """
    x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % stride)).transpose(1, 2)
    x = x.unflatten(2, (-1, stride))
    return (x.flip(3) if flip else x).flatten(3)
