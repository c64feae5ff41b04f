"""The only place that chooses a backend, and the only way from an op to the code that runs it.

An op is declared by the ``op.py`` of its folder: a name, the dataclass of its calls, what a call
writes. A backend is one function, registered by ``@register("<op>", "<name>", rank=...,
refuses=...)`` in a file of that folder, or in a module that another package names in the entry
point group ``flashomni.backends``: adding one edits nothing. Files are imported on the first use of
their folder. What cannot be imported, whatever it raises, is kept as a refusal with its reason.
Choice looks at metadata only (dtype, device, shape), never at tensor values, so that it costs no
synchronisation and works under CUDA graphs.

The call object is the argument all the way: :func:`execute` hands it to the backend as it is. Only
``torch.compile`` sees it taken apart (:mod:`flashomni.flatten`), as one custom op for each op.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from flashomni.flatten import CompiledOp, custom_op
from flashomni.registry import public_modules

GROUP = "flashomni.backends"
# Folder -> its ops. A folder is imported when one of them is used for the first time.
FOLDERS = {
    "flashomni.kernels.attention": ("attention",),
    "flashomni.kernels.gemm_q": ("gemm_q",),
    "flashomni.kernels.gemm_o": ("gemm_o", "gemm_o_update"),
    "flashomni.kernels.elementwise": (
        "modulated_norm",
        "gated_residual",
        "gated_residual_norm",
        "norm_rope",
        "differences",
        "weighted_sum",
    ),
    "flashomni.kernels.merge": ("difference",),
    "flashomni.kernels.refresh": ("refresh",),
    "flashomni.kernels.summarise": ("summarise",),
    "flashomni.symbols.choice": ("choose", "measure", "live_share"),
}
OPS = tuple(op for ops in FOLDERS.values() for op in ops)
_FOLDER = {op: folder for folder, ops in FOLDERS.items() for op in ops}
# Every generation uses these; who adds a backend of attention need not write the others.
HELPERS = (
    *FOLDERS["flashomni.kernels.elementwise"],
    *FOLDERS["flashomni.kernels.merge"],
    *FOLDERS["flashomni.kernels.refresh"],
    *FOLDERS["flashomni.kernels.summarise"],
    *FOLDERS["flashomni.symbols.choice"],
)


@dataclass(frozen=True)
class Op:
    """One op, as its ``op.py`` declares it.

    Args:
        name: one of ``OPS``.
        public: the function that users call; error messages name it.
        compiled: the op as ``torch.compile`` sees it: ``compiled(call, backend)``.
    """

    name: str
    public: str
    compiled: CompiledOp


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    Args:
        op: one of ``OPS``.
        name: what the user passes as ``backend=``.
        rank: the accepting backend with the highest rank runs.
        run: called with the op's call object (``AttentionCall``, ``GemmQCall``, ...).
        refuses: reasons why a call cannot run here; an empty list accepts it.
        available: reasons why the backend cannot run on this machine at all; asked once.
        serves: other names by which it may be asked for.
        device: type of the device its tensors live on; ``None`` takes any.
        package: what brought it by an entry point; ``None`` for the library's own.
        prefers: whether it is worth taking, of a call that it accepts; asked only where nobody
            named a backend. Metadata and tables alone: it is asked at every call.
    """

    op: str
    name: str
    rank: int
    run: Callable[[Any], Any]
    refuses: Callable[[Any], list[str]]
    available: Callable[[], list[str]]
    serves: tuple[str, ...] = ()
    device: str | None = None
    package: str | None = None
    prefers: Callable[[Any], bool] | None = None

    def missing(self) -> list[str]:
        """Why it cannot run on this machine at all."""
        try:
            return self.available()
        except Exception as error:  # somebody else's code
            return [f"cannot tell whether it runs here: {_told(error)}"]


TRITON_FOR = {
    "Linux": "which is not installed: pip install 'flashomni[gpu]'",
    "Windows": "which is not installed: triton-windows is one, and was not tried",
}
NOT_PREFERRED = "is slower here, or was not measured; runs if it is named"

_ops: dict[str, Op] = {}
_registry: dict[tuple[str, str], Backend] = {}
_broken: dict[tuple[str, str], str] = {}
_bringing: list[str] = []  # the package whose entry point is being loaded
_imported: set[str] = set()
_sorted: dict[str, tuple[Backend, ...]] = {}
_usable: dict[tuple[str, str | None], tuple[Backend, ...]] = {}


def declare(
    op: str, call: type, *, public: str, writes: tuple[str, ...] = (), many: bool = False
) -> None:
    """Declare an op; called by its ``op.py``.

    Args:
        op: one of ``OPS``.
        call: the dataclass of its calls.
        public: the function that users call.
        writes: the fields of ``call`` that a backend writes in place. Without any, backends return
            a new tensor.
        many: they return a sequence of new tensors.
    """

    def run(given: Any, backend: str | None) -> Any:
        return select(op, given, backend).run(given)

    def define(given: Any) -> Any:
        return _registry[op, "reference"].run(given)

    _ops[op] = Op(op, public, custom_op(op, call, writes, many, run, define))


def register(
    op: str,
    name: str,
    *,
    rank: int,
    refuses: Callable[[Any], list[str]] = lambda call: [],
    available: Callable[[], list[str]] = lambda: [],
    serves: tuple[str, ...] = (),
    device: str | None = None,
    prefers: Callable[[Any], bool] | None = None,
) -> Callable[[Callable], Callable]:
    """Register the decorated function as backend ``name`` of ``op``.

    ``serves`` are names of families that have no implementation of their own of this op: the Triton
    passes of ``portable`` serve ``sm90``, so that ``backend="sm90"`` means them there.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")

    def keep(run: Callable) -> Callable:
        package = None
        if not run.__module__.startswith("flashomni."):
            _discover(_FOLDER[op])  # the library has its names first
            package = _bringing[-1] if _bringing else None
        taken = _registry.get((op, name))
        if taken is not None:
            whose = "comes with FlashOmni" if taken.package is None else f"is of {taken.package}"
            raise ValueError(f"backend {name!r} of {op} is registered twice: one {whose}")
        _registry[op, name] = Backend(
            op, name, rank, run, refuses, available, serves, device, package, prefers
        )
        forget_choices()
        return run

    return keep


def forget_choices() -> None:
    """Sort and ask the backends anew at the next call; needed after a change of the registry."""
    _sorted.clear()
    _usable.clear()


def arguments(op: str, call: Any, backend: str | None = None) -> tuple[Any, ...]:
    """What ``torch.ops.flashomni.<op>`` takes for ``call``."""
    return _ops[op].compiled.arguments(call, backend)


def _discover(folder: str) -> None:
    """Import every backend file of a folder, and once what other packages bring."""
    if folder in _imported:
        return
    _imported.add(folder)
    importlib.import_module(f"{folder}.op")
    for module in public_modules(folder):
        name = module.rpartition(".")[2]
        try:
            importlib.import_module(module)
        except Exception as error:  # Triton's own among them; the other backends go on
            for op in FOLDERS[folder]:
                _broken[op, name] = f"cannot be imported: {_told(error)}"
    if GROUP not in _imported:
        _imported.add(GROUP)
        for point in entry_points(group=GROUP):
            _load(point)


def _load(point: EntryPoint) -> None:
    """One entry point: its backends are all there, or none and a reason that doctor shows."""
    package = "an unknown package" if point.dist is None else point.dist.name
    before, why = set(_registry), ""
    _bringing.append(package)
    try:
        point.load()
    except Exception as error:
        for key in [key for key in _registry if key not in before]:
            if _registry[key].package == package:
                del _registry[key]
        forget_choices()
        why = f"cannot be imported: {_told(error)}"
    finally:
        _bringing.pop()
    mine = {key for key, backend in _registry.items() if backend.package == package}
    if not why and not any(name == point.name for _, name in mine):
        why = "registers no backend of its name"
    if why:
        known = {name for _, name in (*_registry, *_broken)}
        name = f"{point.name} of {package}" if point.name in known else point.name
        _broken.update({(op, name): f"entry point of {package} {why}" for op in OPS})


def _told(error: Exception) -> str:
    """What an error says, and of a Triton that is not there what to do."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "triton":
        system = platform.system()
        cure = TRITON_FOR.get(system, f"which there is none of for {system}")
        return f"needs Triton, {cure}"
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def registered(op: str) -> tuple[Backend, ...]:
    """Every backend of ``op`` that could be imported, best first."""
    found = _sorted.get(op)
    if found is None:
        _discover(_FOLDER[op])
        mine = (backend for backend in _registry.values() if backend.op == op)
        found = _sorted[op] = tuple(sorted(mine, key=lambda backend: -backend.rank))
    return found


def backends(op: str) -> list[str]:
    """Names of the backends of ``op`` that can run on this machine, best first."""
    return [backend.name for backend in registered(op) if not backend.missing()]


def refusals(op: str) -> dict[str, str]:
    """Why the other backends of ``op`` cannot run on this machine: name -> reason."""
    reasons = {
        backend.name: "; ".join(why) for backend in registered(op) if (why := backend.missing())
    }
    return reasons | {name: why for (of, name), why in _broken.items() if of == op}


def not_on(device: str, tensor: Tensor) -> list[str]:
    """What a backend for one type of device says of a call whose tensors are on another."""
    here = tensor.device.type
    return [] if here == device else [f"tensors are on {here}, this backend is for {device}"]


def has_kernel(op: str, device: str) -> bool:
    """Whether more than the definition of ``op`` runs on this machine without being named.

    Args:
        op: one of ``OPS``.
        device: type of the device that tensors are on.
    """
    usable = _usable.get((op, None)) or _candidates(op, None)
    return any(backend.device == device and backend.prefers is None for backend in usable)


def find(op: str, name: str) -> Backend:
    """The backend ``name`` of ``op``.

    Raises:
        ValueError: there is none.
    """
    for backend in registered(op):
        if backend.name == name:
            return backend
    known = ", ".join(sorted(backend.name for backend in registered(op)))
    raise ValueError(f"backend must be one of {known}, got {name!r}")


def execute(op: str, call: Any, backend: str | None = None) -> Any:
    """Run ``call`` on the backend that :func:`select` finds; what that returns."""
    if torch.compiler.is_compiling():
        return _ops[op].compiled(call, backend)
    return select(op, call, backend).run(call)


def select(op: str, call: Any, name: str | None = None) -> Backend:
    """The backend that will run ``call``.

    Args:
        op: one of ``OPS``.
        call: the op's call object.
        name: take exactly this backend, or the one that serves it, never another. A helper op
            (``HELPERS``) that lacks a backend known to other ops chooses as if not asked.

    Raises:
        ValueError: ``name`` is no backend of ``op``.
        NotImplementedError: nobody accepts the call; the message gives every reason.
    """
    usable = _usable.get((op, name)) if name is None or type(name) is str else None
    if usable is None:
        usable = _candidates(op, name)
    for backend in usable:
        if not backend.refuses(call):
            if name is None and backend.prefers is not None and not backend.prefers(call):
                continue
            return backend
    raise NotImplementedError(_reasons(op, call, name, usable))


def _candidates(op: str, name: str | None) -> tuple[Backend, ...]:
    """The backends that may be asked, best first; remembered, so that a call only looks it up."""
    found = registered(op)
    if name is not None:
        if not isinstance(name, str):
            raise ValueError(f"backend must be a name or None, got {name!r}")
        exact = tuple(backend for backend in found if backend.name == name)
        serving = tuple(backend for backend in found if name in backend.serves)
        broken = (op, name) in _broken
        if not (exact or serving or broken):
            if op not in HELPERS or not _known_elsewhere(name):
                known = {backend.name for backend in found} | _served(found)
                known |= {other for of, other in _broken if of == op}
                raise ValueError(f"backend must be one of {', '.join(sorted(known))}, got {name!r}")
        else:
            found = exact or (() if broken else serving)
    usable = tuple(backend for backend in found if not backend.missing())
    _usable[op, name] = usable
    return usable


def _served(found: tuple[Backend, ...]) -> set[str]:
    return {name for backend in found for name in backend.serves}


def _known_elsewhere(name: str) -> bool:
    return any(backend.name == name for op in OPS for backend in registered(op))


def _reasons(op: str, call: Any, name: str | None, usable: tuple[Backend, ...]) -> str:
    """Why nobody accepts; one line for each backend that was asked."""
    asked = [b for b in registered(op) if name in (None, b.name, *b.serves) or b in usable]
    why = [backend.missing() or backend.refuses(call) or [NOT_PREFERRED] for backend in asked]
    lines = [
        f"  {backend.name}: {'; '.join(reasons)}"
        for backend, reasons in zip(asked, why, strict=True)
    ]
    lines += [
        f"  {known}: {why}"
        for (of, known), why in _broken.items()
        if of == op and name in (None, known)
    ]
    return f"no backend of {_ops[op].public} accepts this call\n" + "\n".join(lines)
