"""Call objects as arguments of a torch.library op: one flatten and unflatten for every dataclass.

``torch.compile`` sees an op as a function of tensors, numbers and strings. A call is a dataclass
of these, of tuples and lists of tensors, and of other dataclasses; its type hints give the schema.
Each *leaf* is one argument. What may be ``None`` has one more, which says whether it is there.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SCALARS = {int: "SymInt", float: "float", str: "str", bool: "bool", Tensor: "Tensor",
           torch.dtype: "ScalarType"}  # fmt: skip
_views: dict[type, tuple[dict[str, Any], Callable, Callable]] = {}


@dataclasses.dataclass(frozen=True)
class Part:
    """How one value becomes arguments.

    Args:
        schema: types of the arguments in a torch.library schema; empty for a composite.
        optional: whether the value may be ``None``.
        parts: of a composite, its members: ``(name, part)``.
        take: of a composite, its members' values, from the value.
        make: of a composite, the value, from its members' values.
    """

    schema: str
    optional: bool
    parts: tuple[tuple[str, Part], ...] = ()
    take: Callable[[Any], tuple] | None = None
    make: Callable[..., Any] | None = None


def see_as(
    cls: type, hints: dict[str, Any], take: Callable[[Any], tuple], make: Callable[..., Any]
) -> None:
    """Let objects of ``cls`` travel as the values of ``take(value)``, typed by ``hints``.

    For classes that hold more than a backend reads; others travel field by field.
    """
    _views[cls] = (hints, take, make)


def custom_op(
    name: str,
    call: type,
    writes: tuple[str, ...],
    many: bool,
    run: Callable[[Any, str | None], Any],
    define: Callable[[Any], Any],
) -> CompiledOp:
    """The op ``flashomni::name`` as a function of the call object and the backend's name.

    Args:
        name: of the op.
        call: the dataclass of its calls.
        writes: fields that are written in place. Without any, ``run`` returns a new tensor, which
            leaves the op contiguous.
        many: it returns a sequence of new tensors.
        run: what the op does.
        define: the same in torch; it tells the shapes and dtypes of what is returned.
    """
    whole = _composite(call, optional=False)
    arguments = list(_arguments(whole, "", writes))
    result = "()" if writes else "Tensor[]" if many else "Tensor"
    schema = f"({', '.join([*arguments, 'str? backend'])}) -> {result}"

    def implement(*flat: Any) -> Any:
        given, _ = _join(whole, flat, 0)
        return _contiguous(run(given, flat[-1]))

    def fake(*flat: Any) -> Any:
        if writes:
            return None  # it only mutates: nothing to infer
        given, _ = _join(whole, flat, 0)
        return _contiguous(define(given))

    op = torch.library.custom_op(
        f"flashomni::{name}", implement, mutates_args=set(writes), schema=schema
    )
    op.register_fake(fake)

    return CompiledOp(op, whole)


@dataclasses.dataclass(frozen=True)
class CompiledOp:
    """An op of ``torch.ops`` as a function of the call object and the backend's name."""

    op: Any
    whole: Part

    def arguments(self, call: Any, backend: str | None) -> tuple[Any, ...]:
        """What the op of ``torch.ops`` takes."""
        flat: list[Any] = []
        _split(self.whole, call, flat)
        return (*flat, backend)

    def __call__(self, call: Any, backend: str | None) -> Any:
        return self.op(*self.arguments(call, backend))


def _contiguous(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return None if result is None else [tensor.contiguous() for tensor in result]


def _part(hint: Any) -> Part:
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional, (hint,) = len(members) < len(typing.get_args(hint)), members
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return Part(SCALARS[hint], optional)
    if origin in (list, Sequence) and arguments == (Tensor,):
        return Part("Tensor[]", optional)
    if origin in (list, Sequence) and arguments == (float,):
        return Part("float[]", optional)
    if origin in (list, Sequence) and arguments == (int,):
        return Part("SymInt[]", optional)
    if origin is tuple and Ellipsis not in arguments:
        parts = tuple((str(index), _part(each)) for index, each in enumerate(arguments))
        return Part("", optional, parts, tuple, lambda *members: tuple(members))
    if dataclasses.is_dataclass(hint):
        return _composite(hint, optional)
    raise TypeError(f"a call cannot hold {hint}")


def _composite(cls: Any, optional: bool) -> Part:
    if cls in _views:
        hints, take, make = _views[cls]
        parts = tuple((name, _part(hint)) for name, hint in hints.items())
        return Part("", optional, parts, take, make)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    parts = tuple((name, _part(hints[name])) for name in names)
    return Part("", optional, parts, lambda value: tuple(getattr(value, n) for n in names), cls)


def _arguments(
    part: Part, name: str, writes: tuple[str, ...], absent: bool = False
) -> Iterator[str]:
    """The schema of the arguments of a part, those of a part that may be absent all optional."""
    if part.schema:
        kind = part.schema
        if name in writes:
            kind += f"(a{writes.index(name)}!)"
        yield f"{kind}{'?' if part.optional or absent else ''} {name}"
        return
    absent = absent or part.optional
    if part.optional:
        yield f"bool has_{name}"
    for member, each in part.parts:
        yield from _arguments(each, f"{name}_{member}" if name else member, writes, absent)


def _split(part: Part, value: Any, flat: list[Any]) -> None:
    if part.take is None:
        flat.append(list(value) if value is not None and part.schema.endswith("[]") else value)
        return
    if part.optional:
        flat.append(value is not None)
    members: Sequence[Any] = [None] * len(part.parts) if value is None else part.take(value)
    for (_, each), member in zip(part.parts, members, strict=True):
        _split(each, member, flat)


def _join(part: Part, flat: Sequence[Any], at: int) -> tuple[Any, int]:
    if part.make is None:
        return flat[at], at + 1
    here = True
    if part.optional:
        here, at = flat[at], at + 1
    members = []
    for _, each in part.parts:
        member, at = _join(each, flat, at)
        members.append(member)
    return (part.make(*members) if here else None), at
