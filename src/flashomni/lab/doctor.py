"""What `flashomni doctor` says, as plain rows: nothing here needs the extra ``lab``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashomni.kernels import OPS, refusals, registered
from flashomni.lab.versions import versions


def facts() -> list[tuple[str, str]]:
    """Versions, device and commit: what, value."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = versions(device)
    return [*found.items(), ("cuda devices", str(torch.cuda.device_count()))]


def backends(op: str | None = None) -> list[tuple[str, str, str]]:
    """Op, backend, and ``yes`` or why it does not run here; the best backend of an op first.

    Raises:
        ValueError: there is no such op.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    rows = []
    for known in OPS if op is None else (op,):
        why = refusals(known)
        for backend in registered(known):
            rows.append((known, backend.name, why.pop(backend.name, "yes")))
        rows += [(known, broken, reason) for broken, reason in why.items()]
    return rows


def text() -> str:
    """Both as aligned lines."""
    return "\n".join([*_aligned(facts()), "", *_aligned(backends())])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
