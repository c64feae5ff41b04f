"""Is torch's dense attention faster than ours on this card? Measured on request, and remembered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flashomni.dispatch import Backend, find, registered
from flashomni.kernels.attention import _measured
from flashomni.kernels.attention.op import AttentionCall
from flashomni.lab.ops.timing import interleaved
from flashomni.util.files import locked, write_text

HEAD_DIMS = (64, 80, 96, 128, 256)
TOKENS = (1024, 4608, 16896, 33024)  # one of each length that the table tells apart
WIDTH = 3072  # features of a token; heads are as many as fit
ROUNDS = 5


@dataclass(frozen=True)
class DenseRow:
    """One shape: milliseconds of torch's attention, copy into ``out`` included, and of ours."""

    dtype: str
    head_dim: int
    seqlen: int
    backend: str
    ours_ms: float
    sdpa_ms: float


def measure_dense(
    device: torch.device,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    head_dims: Sequence[int] = HEAD_DIMS,
    tokens: Sequence[int] = TOKENS,
) -> Iterator[DenseRow]:
    """Time dense self-attention of each shape; every row is remembered as soon as it is measured.

    From the next process on, and in this one, a dense call of such a shape runs whichever was
    faster. Nothing else does that: no call is ever timed on a step's path.

    Raises:
        NotImplementedError: the device is no CUDA device.
    """
    if device.type != "cuda":
        raise NotImplementedError(f"only a CUDA device has two to choose from, got {device}")
    for dtype, head_dim, seqlen in itertools.product(dtypes, head_dims, tokens):
        row = _measure(device, dtype, head_dim, seqlen)
        remember(torch.cuda.get_device_name(device), dtype, row)
        yield row


def _measure(device: torch.device, dtype: torch.dtype, head_dim: int, seqlen: int) -> DenseRow:
    size = (1, seqlen, max(WIDTH // head_dim, 1), head_dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    call = AttentionCall(q, k, v, torch.empty_like(q), None, None, None, head_dim**-0.5)
    ours, sdpa = best_other(call), find("attention", "sdpa")
    runs = {"ours": lambda i: ours.run(call), "sdpa": lambda i: sdpa.run(call)}
    ms = {name: round(time, 4) for name, time in interleaved(runs, device, ROUNDS, 1).items()}
    name = str(dtype).removeprefix("torch.")
    return DenseRow(name, head_dim, seqlen, ours.name, ms["ours"], ms["sdpa"])


def best_other(call: AttentionCall) -> Backend:
    """What runs the call where torch's attention does not."""
    return next(
        backend
        for backend in registered("attention")
        if backend.name != "sdpa" and not backend.missing() and not backend.refuses(call)
    )


def remember(card: str, dtype: torch.dtype, row: DenseRow) -> None:
    """Put a row into the user's file of the card; rows made with other versions go."""
    path = _measured.remembered(card)
    with locked(path.parent):
        table = _measured.of_user(path)
        times = {"ours_ms": row.ours_ms, "sdpa_ms": row.sdpa_ms}
        table[_measured.key(dtype, row.head_dim, row.seqlen)] = times
        whole = {"made with": _measured.made_with(), _measured.TABLE: table}
        write_text(path, json.dumps(whole, indent=1, sort_keys=True) + "\n")
    _measured.entries.cache_clear()
