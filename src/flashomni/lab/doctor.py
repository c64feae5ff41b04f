"""What `flashomni doctor` says, as plain rows: nothing here needs the extra ``lab``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flashomni.kernels import OPS, refusals, registered
from flashomni.kernels.attention._measured import entries
from flashomni.kernels.common import tuned
from flashomni.kernels.common.configs import places, read
from flashomni.lab.versions import versions
from flashomni.models import Foreseen, foresee

CHOSEN = "yes, for calls that it is worth taking for, or if it is named"
UNMEASURED = "torch's attention not measured: flashomni tune-kernels"


def facts() -> list[tuple[str, str]]:
    """Versions, device and commit: what, value."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {**versions(device), "cuda devices": str(torch.cuda.device_count())}
    if device.type == "cuda":
        found["kernel tables"] = tables(device)
    return list(found.items())


def tables(device: torch.device) -> str:
    """For which card the tiles of the portable kernels were chosen, and what is not measured here.

    Args:
        device: a CUDA device.
    """
    card, architecture, _ = places(device)
    own = tuned.of_card(device)
    if own.when:
        better = sum(map(len, own.tables.values()))
        tiles = f"tuned here on {own.when}: {better} of {sum(map(len, own.tried.values()))} changed"
    elif read(card):
        tiles = "of this card"
    elif read(architecture):
        tiles = f"of {architecture}, untuned for this card"
    else:
        tiles = "untuned: chosen on an H200"
    if own.ignored:
        tiles = f"{tiles} ({own.ignored})"
    told = entries(device)
    dense = f"torch's attention measured for {len(told)} shapes" if told else UNMEASURED
    return f"{tiles}; {dense}"


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


def in_short() -> list[tuple[str, str, str]]:
    """Backend, ``yes`` or why it does not run here, and the ops that this is so for.

    ``yes`` is of the ops whose best backend it is: they run it. Those come first.
    """
    taken: dict[tuple[str, str], list[str]] = {}
    absent: dict[tuple[str, str], list[str]] = {}
    for op in OPS:
        rows = backends(op)
        chosen = {backend.name for backend in registered(op) if backend.prefers is not None}
        best = next((n for _, n, why in rows if why == "yes" and n not in chosen), "none")
        taken.setdefault((best, "yes"), []).append(op)
        for _, name, why in rows:
            if why == "yes" and name in chosen:
                why = CHOSEN
            if why != "yes":
                absent.setdefault((name, why), []).append(op)
    return [(*key, ", ".join(ops)) for key, ops in (taken | absent).items()]


def pipeline(folder: str | Path) -> list[tuple[str, str]]:
    """What ``accelerate`` would do to the pipeline of a folder: what, value. Reads no weights.

    Raises:
        ValueError: it is no folder of a pipeline with a transformer.
    """
    return [row for found in foresee(folder) for row in _foreseen(found)]


def _foreseen(found: Foreseen) -> Iterator[tuple[str, str]]:
    yield found.component, found.transformer
    if found.refused:
        yield "refused", found.refused
    else:
        yield "tier", found.tier
        yield "blocks", ", ".join(f"{path} {count}" for path, count in found.blocks.items())
        ours = "of every block on FlashOmni's op"
        yield "attention", ours if found.tier == "adapter" else "seen in the first call"
    if found.parameters:
        size = (found.weight_bytes or 2 * found.parameters) / 2**30
        how = "of its files" if found.weight_bytes else "in bfloat16"
        yield "weights", f"{size:.2f} GiB {how}, {found.parameters / 1e9:.2f} B parameters"
    if found.inner and not found.refused:
        each = f"{2 * found.inner / 1024:.1f} KiB a token"
        yield "kept", f"{each} for each run of cached layers and term of its forecast, in 16 bits"
    for note in found.notes:
        yield "note", note


def text() -> str:
    """Both as aligned lines."""
    return "\n".join([*_aligned(facts()), "", *_aligned(in_short())])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
