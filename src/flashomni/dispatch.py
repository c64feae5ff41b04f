"""The only place that chooses a backend.

A backend is one function in one file: ``kernels/<op>/<name>.py``, registered by
``@register("<op>", "<name>", rank=..., refuses=...)``. Files are found by name and imported on the
first use of their op, so adding a backend edits nothing. A file that cannot be imported is kept
as a refusal with its reason. Choice looks at metadata only (dtype, device, shape), never at tensor
values, so that it costs no synchronisation and works under CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashomni.registry import public_modules

OPS = ("attention", "gemm_q", "gemm_o", "gemm_o_update")
PUBLIC_NAMES = {
    "attention": "sparse_attention",
    "gemm_q": "sparse_gemm_q",
    "gemm_o": "sparse_gemm_o",
    "gemm_o_update": "gemm_o_update",
}


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        op: one of ``OPS``.
        name: what the user passes as ``backend=``.
        rank: the accepting backend with the highest rank runs.
        run: called with the op's call object (``AttentionCall``, ``GemmQCall``, ``GemmOCall``).
        refuses: reasons why a call cannot run here; an empty list accepts it.
        available: reasons why the backend cannot run on this machine at all.
    """

    op: str
    name: str
    rank: int
    run: Callable[[Any], Any]
    refuses: Callable[[Any], list[str]]
    available: Callable[[], list[str]]


_registry: dict[tuple[str, str], Backend] = {}
_broken: dict[tuple[str, str], str] = {}


def register(
    op: str,
    name: str,
    *,
    rank: int,
    refuses: Callable[[Any], list[str]] = lambda call: [],
    available: Callable[[], list[str]] = lambda: [],
) -> Callable[[Callable], Callable]:
    """Register the decorated function as backend ``name`` of ``op``."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")

    def keep(run: Callable) -> Callable:
        if (op, name) in _registry:
            raise ValueError(f"backend {name!r} of {op} is registered twice")
        _registry[op, name] = Backend(op, name, rank, run, refuses, available)
        return run

    return keep


@functools.cache
def _discover() -> None:
    """Import every backend file of every op; a failure becomes that backend's refusal."""
    for op in ("attention", "gemm_q", "gemm_o"):
        for module in public_modules(f"flashomni.kernels.{op}"):
            name = module.rpartition(".")[2]
            try:
                importlib.import_module(module)
            except ImportError as error:
                for broken in (op, "gemm_o_update") if op == "gemm_o" else (op,):
                    _broken[broken, name] = f"cannot be imported: {error}"


def registered(op: str) -> list[Backend]:
    """Every backend of ``op`` that could be imported, best first."""
    _discover()
    return sorted(
        (backend for backend in _registry.values() if backend.op == op),
        key=lambda backend: -backend.rank,
    )


def backends(op: str) -> list[str]:
    """Names of the backends of ``op`` that can run on this machine, best first."""
    return [backend.name for backend in registered(op) if not backend.available()]


def refusals(op: str) -> dict[str, str]:
    """Why the other backends of ``op`` cannot run on this machine: name -> reason."""
    reasons = {
        backend.name: "; ".join(backend.available())
        for backend in registered(op)
        if backend.available()
    }
    return reasons | {name: why for (of, name), why in _broken.items() if of == op}


def select(op: str, call: Any, name: str | None = None) -> Backend:
    """The backend that will run ``call``.

    Args:
        op: one of ``OPS``.
        call: the op's call object.
        name: take exactly this backend, never another.

    Raises:
        ValueError: ``name`` is no backend of ``op``.
        NotImplementedError: nobody accepts the call; the message gives every reason.
    """
    found = registered(op)
    broken = {known: why for (of, known), why in _broken.items() if of == op}
    if name is not None:
        known = [backend.name for backend in found] + list(broken)
        if name not in known:
            raise ValueError(f"backend must be one of {', '.join(sorted(known))}, got {name!r}")
        found = [backend for backend in found if backend.name == name]
        broken = {known: why for known, why in broken.items() if known == name}
    reasons = []
    for backend in found:
        why = backend.available() or backend.refuses(call)
        if not why:
            return backend
        reasons.append(f"  {backend.name}: {'; '.join(why)}")
    reasons += [f"  {known}: {why}" for known, why in broken.items()]
    raise NotImplementedError(
        f"no backend of {PUBLIC_NAMES[op]} accepts this call\n" + "\n".join(reasons)
    )
