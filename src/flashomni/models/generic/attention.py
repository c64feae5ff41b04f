"""Which calls of ``F.scaled_dot_product_attention`` can run on our op, and how; and FLOPs of calls.

Letters in shapes: B batch, H num_heads, Hkv key heads, M, N tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashomni.dispatch import has_kernel, select
from flashomni.kernels.attention.op import AttentionCall

SDPA = functional.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
CROSS = "its keys are other tokens than its queries"


@dataclass(frozen=True)
class Attention:
    """The arguments of one call.

    Args:
        q: ``[B, H, M, D]``.
        k: ``[B, Hkv, N, D]``, like ``v``.
        v: values.
        mask: ``attn_mask``.
        scale: of the scores.
        other: what our op has no equal of, in words.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    other: str | None

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any]) -> Attention:
        """The call of ``F.scaled_dot_product_attention`` with these arguments."""
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        q, scale = given["query"], given.get("scale")
        other = "it is causal" if given.get("is_causal") else None
        if given.get("dropout_p"):
            other = "it drops out"
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        return cls(q, given["key"], given["value"], given.get("attn_mask"), scale, other)

    @property
    def size(self) -> int:
        """Scores: ``B * H * M * N``."""
        return self.q.shape[:-1].numel() * self.k.shape[-2]

    @property
    def flops(self) -> int:
        return 2 * self.size * (self.q.shape[-1] + self.v.shape[-1])

    def why_not(self, backend: str | None) -> str | None:
        """Why our op does not compute this; ``None`` if it does. Looks at no value of a tensor."""
        q, k, v = self.q, self.k, self.v
        if q.ndim != 4 or k.ndim != 4:
            return f"its queries are {list(q.shape)}, not [B, H, M, D]"
        if q.shape[2] != k.shape[2]:
            return CROSS
        if self.other is not None:
            return self.other
        if v.shape != k.shape or q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0]:
            return f"its keys and values are {list(k.shape)} and {list(v.shape)}"
        return self._why_not_masked() or _why_no_kernel(self, backend)

    def _why_not_masked(self) -> str | None:
        mask = self.mask
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            return "its mask is added to the scores"
        if mask.ndim != 4 or mask.shape[3] != self.k.shape[2]:
            return f"its mask is {list(mask.shape)}"
        if mask.shape[0] not in (1, self.q.shape[0]):
            return f"its mask is {list(mask.shape)}"
        alike = all(mask.shape[dim] == 1 or mask.stride(dim) == 0 for dim in (1, 2))
        return None if alike else "its mask is not the same for all queries"


def _why_no_kernel(call: Attention, backend: str | None) -> str | None:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    asked = AttentionCall(q, k, v, torch.empty_like(q, device="meta"), None, None, None, call.scale)
    try:
        found = select("attention", asked, backend)
    except NotImplementedError as refusal:
        return str(refusal).splitlines()[-1].strip()
    served = found.name != "reference" and has_kernel("attention", q.device.type)
    if backend is None and not served:
        return f"no kernel of ours takes {str(q.dtype).removeprefix('torch.')} on {q.device.type}"
    return None


def valid_first(mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """A key mask as an order of the keys and their number: softmax does not mind the order.

    Args:
        mask: bool ``[1 | B, *, *, N]``, the same for all heads and queries.
        batch: B.

    Returns:
        int64 ``[B, N]``, valid keys first and otherwise as they were; int32 ``[B]``, how many.
    """
    rows = mask[:, 0, 0].expand(batch, -1)
    return (~rows).to(torch.uint8).argsort(dim=-1, stable=True), rows.sum(-1, dtype=torch.int32)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of ``[B, N, H, D]`` in another order."""
    return x.gather(1, order[:, :, None, None].expand_as(x))


def _product(x: Tensor, out: Tensor) -> int:
    return 2 * out.numel() * x.shape[-1]


def _matmul(args: tuple, kwargs: Mapping[str, Any], out: Tensor) -> int:
    return _product(args[0] if args else kwargs["input"], out)


def _added(args: tuple, kwargs: Mapping[str, Any], out: Tensor) -> int:
    return _product(args[1] if len(args) > 1 else kwargs["batch1"], out)


def _convolution(args: tuple, kwargs: Mapping[str, Any], out: Tensor) -> int:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return 2 * out.numel() * weight[0].numel()


_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_FLOPS: dict[Any, Callable[..., int]] = {
    functional.linear: _matmul,
    torch.baddbmm: _added,
    **dict.fromkeys(_PRODUCTS, _matmul),
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}


def product_flops(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of a product or a convolution; 0 for every other function."""
    counts = _FLOPS.get(func)
    return 0 if counts is None or not isinstance(out, Tensor) else counts(args, kwargs, out)
