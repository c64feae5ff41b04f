"""One call of a model, watched: what each block gets and returns, and who reads that.

A torch function mode sees every torch function of the call. It stands on this thread only, and
nothing of the model or of torch is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from flashomni.models.generic.attention import SDPA, Attention, product_flops

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
# What says nothing of a tensor's values.
METADATA = {
    "__len__", "_version", "data_ptr", "device", "dim", "dtype", "element_size", "get_device",
    "is_complex", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_leaf",
    "is_mps", "is_sparse", "layout", "names", "nelement", "ndim", "numel", "requires_grad",
    "shape", "size", "storage_offset", "stride",
}  # fmt: skip


@dataclass(frozen=True)
class Attended:
    """One attention inside a block.

    Args:
        size: number of scores.
        why_not: why our op does not compute it.
    """

    size: int
    why_not: str | None


@dataclass
class Seen:
    """One call of one block.

    Attributes:
        number: of the block.
        inputs: shape and dtype of each tensor argument, by name.
        outputs: likewise of what it returned; ``None`` where that is ``None``.
        kind: type of what it returned.
        problem: why it cannot be left out, in words.
        handed: position of an output -> argument of the next block that it became.
        others: whether something else than the next block has read an output.
        attention: inside it, in order.
    """

    number: int
    inputs: dict[str, tuple]
    outputs: list[tuple | None] = field(default_factory=list)
    kind: type = Tensor
    problem: str = ""
    handed: dict[int, str] = field(default_factory=dict)
    others: bool = False
    attention: list[Attended] = field(default_factory=list)


class Watch(TorchFunctionMode):
    """Watches one call of a model.

    Args:
        backend: of attention, as the user asked for it.

    Attributes:
        seen: the calls of blocks, in order.
    """

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self._backend = backend
        self._inside: Seen | None = None
        self._add: Callable[[str, int], None] = _ignore
        self._made = WeakIdKeyDictionary()  # output -> (call of a block, position)

    def block(
        self,
        number: int,
        forward: Callable[..., Any],
        named: Mapping[str, Any],
        args: tuple,
        kwargs: dict,
        add: Callable[[str, int], None],
    ) -> Any:
        """Run a block as it is.

        Args:
            number: of the block.
            forward: of it.
            named: its arguments by name.
            args: of the call, like ``kwargs``.
            add: gets the FLOPs of each op.
        """
        if self._inside is not None:  # of a block that is watched already
            return forward(*args, **kwargs)
        seen = Seen(number, {name: _meta(v) for name, v in named.items() if isinstance(v, Tensor)})
        seen.problem = next(filter(None, map(_opaque, named.items())), "")
        self._see_arguments(named)
        state = {name: _state(value) for name, value in named.items()}
        copies = {
            n: v.clone() for n, v in named.items() if isinstance(v, Tensor) and v.is_inference()
        }
        self._inside, self._add = seen, add
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside, self._add = None, _ignore
        changed = [name for name, value in named.items() if _state(value) != state[name]]
        changed += [name for name, copy in copies.items() if not torch.equal(copy, named[name])]
        if changed:
            seen.problem = seen.problem or f"it writes into its argument {changed[0]}"
        self._see_output(seen, output)
        self.seen.append(seen)
        return output

    def _see_arguments(self, named: Mapping[str, Any]) -> None:
        last = len(self.seen) - 1
        for name, value in named.items():
            if isinstance(value, Tensor):
                call, position = self._made.get(value, (None, 0))
                if call == last and call is not None:
                    self.seen[call].handed.setdefault(position, name)
                elif call is not None:
                    self.seen[call].others = True
            else:
                self._read(value)

    def _see_output(self, seen: Seen, output: Any) -> None:
        seen.kind = type(output)
        if not isinstance(output, (Tensor, tuple)):
            seen.problem = seen.problem or f"it returns a {type(output).__name__}"
            return
        parts = (output,) if isinstance(output, Tensor) else output
        for position, part in enumerate(parts):
            if part is not None and not isinstance(part, Tensor):
                seen.problem = seen.problem or f"it returns a {type(part).__name__} among others"
                return
            seen.outputs.append(None if part is None else _meta(part))
            if part is not None:
                self._made[part] = len(self.seen), position

    def finish(self, output: Any) -> list[Seen]:
        """The model has returned ``output``; what was seen."""
        self._read(output)
        return self.seen

    def _read(self, value: Any) -> None:
        for tensor in _tensors(value):
            if tensor in self._made:
                self.seen[self._made[tensor][0]].others = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = self._inside
        if inside is None:
            if _name(func) not in METADATA:
                self._read((args, kwargs))
            return func(*args, **kwargs)
        if func is SDPA:
            call = Attention.of(args, kwargs)
            inside.attention.append(Attended(call.size, call.why_not(self._backend)))
            self._add("attention", call.flops)
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        flops = product_flops(func, args, kwargs, output)
        if flops:
            self._add("mlp", flops)
        return output


def _ignore(op: str, flops: int) -> None:
    """FLOPs outside of the blocks."""


def named_arguments(names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; those of ``*args`` by their position."""
    many = [f"argument {i}" for i in range(len(names), len(args))]
    return {**dict(zip((*names, *many), args, strict=False)), **kwargs}


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _meta(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _state(value: Any) -> Any:
    """What changes if somebody writes into an argument."""
    if isinstance(value, Tensor):
        return id(value), -1 if value.is_inference() else value._version
    if isinstance(value, Mapping):
        return {key: _state(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_state(part) for part in value]
    return id(value)


def _opaque(item: tuple[str, Any]) -> str:
    """Why an argument may be changed by a block without anybody seeing it."""
    name, value = item
    if isinstance(value, (Tensor, *PLAIN)):
        return ""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next(filter(None, (_opaque((name, part)) for part in value)), "")
    return f"its argument {name} is a {type(value).__name__}, which it may change"
