"""What a planned attention is about: where requests start, heads, blocks; what is not supported.

Letters in shapes: B requests, M and N query and key tokens of all requests together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashomni.compat.packing import (
    check_indptr,
    check_segments,
    from_packed,
    host_indptr,
    num_bytes,
)
from flashomni.kernels import backends, refusals
from flashomni.kernels.common.checks import float_dtypes
from flashomni.symbols import Grid, Symbols

# Their kernels, by the generation of GPU that they are written for, and ours.
THEIR_BACKENDS = {"fa2": "portable", "fa3": "sm90"}


class Request(NamedTuple):
    """Where a request starts and how long it is, in queries and in keys."""

    q_start: int
    seqlen_q: int
    kv_start: int
    seqlen_kv: int

    @property
    def lengths(self) -> tuple[int, int]:
        return self.seqlen_q, self.seqlen_kv


@dataclass(frozen=True)
class Group:
    """Neighbouring requests of equal lengths: they run as one batch."""

    first: int
    members: tuple[Request, ...]

    def queries(self, x: Tensor) -> Tensor:
        """Its rows of ``[M, ...]`` as ``[members, seqlen_q, ...]``, a view."""
        return self._batch(x, self.members[0].q_start, self.members[0].seqlen_q)

    def keys(self, x: Tensor) -> Tensor:
        """Its rows of ``[N, ...]`` as ``[members, seqlen_kv, ...]``, a view."""
        return self._batch(x, self.members[0].kv_start, self.members[0].seqlen_kv)

    def indptr(self, x: Tensor) -> Tensor:
        """Its part of ``[B + 1]``."""
        return x[self.first : self.first + len(self.members) + 1]

    def _batch(self, x: Tensor, start: int, seqlen: int) -> Tensor:
        count = len(self.members)
        return x[start : start + count * seqlen].unflatten(0, (count, seqlen))


@dataclass(frozen=True)
class Plan:
    """One call of ``plan``.

    Args:
        requests: all of them, in order.
        groups: :func:`group_equal` of them.
        num_qo_heads: H, a multiple of ``num_kv_heads``.
        num_kv_heads: Hkv.
        head_dim: D.
        block_m: tokens of a query block.
        block_n: tokens of a key block.
        dtype: of q, k and v.
        softmax_scale: ``None`` stands for ``D ** -0.5``.
    """

    requests: tuple[Request, ...]
    groups: tuple[Group, ...]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    block_m: int
    block_n: int
    dtype: torch.dtype
    softmax_scale: float | None

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_qo_heads, self.num_kv_heads
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_qo_heads must be a positive multiple of num_kv_heads={kv_heads}, got {heads}"
            )
        blocks = (
            ("sparse_block_size_for_q", self.block_m),
            ("sparse_block_size_for_kv", self.block_n),
        )
        for name, block in blocks:
            if block < 16 or block % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {block}")

    @property
    def num_q_tokens(self) -> int:
        last = self.requests[-1]
        return last.q_start + last.seqlen_q

    @property
    def num_kv_tokens(self) -> int:
        last = self.requests[-1]
        return last.kv_start + last.seqlen_kv

    def grid(self, group: Group) -> Grid:
        seqlen_q, seqlen_kv = group.members[0].lengths
        return Grid(seqlen_q, seqlen_kv, block_m=self.block_m, block_n=self.block_n)

    def q_bits(self) -> list[int]:
        """Bits of S_c of each request."""
        return [-(-r.seqlen_q // self.block_m) * self.num_qo_heads for r in self.requests]

    def kv_bits(self) -> list[int]:
        """Bits of S_s of each request."""
        columns = (-(-request.seqlen_kv // self.block_n) for request in self.requests)
        return [rows * count for rows, count in zip(self.q_bits(), columns, strict=True)]

    def symbols(
        self,
        sparse_info: Tensor | None,
        sparse_kv_info: Tensor | None,
        sparse_info_indptr: Tensor | None,
        sparse_kv_info_indptr: Tensor | None,
        device: torch.device,
    ) -> list[Symbols]:
        """The symbols of each group, from the authors' packing."""
        requests = len(self.requests)
        q_bytes = sum(map(num_bytes, self.q_bits()))
        kv_bytes = sum(map(num_bytes, self.kv_bits()))
        what = f"the {requests} planned requests"
        q_bits, q_starts = check_segments(
            "sparse_info", sparse_info, sparse_info_indptr, requests, q_bytes, what, device
        )
        kv_bits, kv_starts = check_segments(
            "sparse_kv_info",
            sparse_kv_info,
            sparse_kv_info_indptr,
            requests,
            kv_bytes,
            what,
            device,
        )
        return [
            from_packed(
                q_bits,
                kv_bits,
                group.indptr(q_starts),
                group.indptr(kv_starts),
                self.grid(group),
                self.num_qo_heads,
            )
            for group in self.groups
        ]


def group_equal(requests: tuple[Request, ...]) -> tuple[Group, ...]:
    """Runs of neighbours of equal lengths; requests without queries are left out."""
    groups, first = [], 0
    for (seqlen_q, _), run in groupby(requests, lambda request: request.lengths):
        members = tuple(run)
        if seqlen_q:
            groups.append(Group(first, members))
        first += len(members)
    return tuple(groups)


def read_requests(qo_indptr: Tensor, kv_indptr: Tensor) -> tuple[Request, ...]:
    """Read both indptr on the host, which waits for the device."""
    check_indptr("qo_indptr", qo_indptr)
    check_indptr("kv_indptr", kv_indptr)
    if len(qo_indptr) != len(kv_indptr):
        raise ValueError(f"kv_indptr must be [{len(qo_indptr)}], got {list(kv_indptr.shape)}")
    ends = {"qo_indptr": host_indptr("qo_indptr", qo_indptr)}
    ends["kv_indptr"] = host_indptr("kv_indptr", kv_indptr)
    for name, values in ends.items():
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0, got {values[0]}")
    spans = zip(pairwise(ends["qo_indptr"]), pairwise(ends["kv_indptr"]), strict=True)
    requests = tuple(
        Request(q, q_stop - q, kv, kv_stop - kv) for (q, q_stop), (kv, kv_stop) in spans
    )
    for index, request in enumerate(requests):
        if request.seqlen_q and not request.seqlen_kv:
            raise ValueError(
                f"kv_indptr must give a request with queries a key, got none for request {index}"
            )
    return requests


def refuse_masks(**masks: Tensor | None) -> None:
    """Token masks: the ops know blocks only."""
    for name, mask in masks.items():
        if mask is not None:
            raise NotImplementedError(
                f"{name} is not supported, it must be None; keys that are padding must be left out "
                "of k, v and kv_indptr"
            )


def refuse_options(
    causal: bool,
    pos_encoding_mode: str,
    use_fp16_qk_reduction: bool,
    logits_soft_cap: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
) -> None:
    """Options of the authors' kernels that ours do not have, unless they change nothing."""
    modes = ("NONE", "ROPE_LLAMA", "ALIBI")
    if pos_encoding_mode not in modes:
        raise ValueError(
            f"pos_encoding_mode must be one of {', '.join(modes)}, got {pos_encoding_mode!r}"
        )
    options: list[tuple[str, Any, tuple]] = [
        ("causal", causal, (False,)),
        ("pos_encoding_mode", pos_encoding_mode, ("NONE",)),
        ("use_fp16_qk_reduction", use_fp16_qk_reduction, (False,)),
        ("logits_soft_cap", logits_soft_cap, (None, 0)),
        ("rope_scale", rope_scale, (None, 1)),
        ("rope_theta", rope_theta, (None, 1e4)),
    ]
    for name, given, allowed in options:
        if given not in allowed:
            names = " or ".join(repr(value) for value in allowed)
            raise NotImplementedError(
                f"{name} must be {names}: nothing else is supported, got {given!r}"
            )


def read_dtype(name: str, dtype: str | torch.dtype) -> torch.dtype:
    """A dtype or its name; one that the ops take."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} must be a torch.dtype or the name of one, got {dtype!r}")
    if found not in float_dtypes:
        names = " or ".join(str(known).removeprefix("torch.") for known in float_dtypes)
        raise NotImplementedError(f"{name} must be {names}, got {found}")
    return found


def read_scale(sm_scale: float | None) -> float | None:
    if sm_scale is not None and not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale must be finite, got {sm_scale}")
    return sm_scale


def read_backend(name: str) -> str | None:
    """The name that :func:`flashomni.sparse_attention` knows."""
    if name == "auto":
        return None
    usable, reasons = backends("attention"), refusals("attention")
    known = sorted({"auto", *THEIR_BACKENDS, *usable, *reasons})
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {name!r}")
    ours = THEIR_BACKENDS.get(name, name)
    if ours not in usable:
        why = reasons.get(ours, "not in this version")
        raise NotImplementedError(f"backend {name!r} needs our {ours!r}, which cannot run: {why}")
    return ours
