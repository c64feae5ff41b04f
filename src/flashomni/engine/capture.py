"""One call of a model as a CUDA graph: recorded once, replayed as one launch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Uncapturable(Exception):
    """A call does what a graph cannot repeat; the message says what."""


class Replay(Protocol):
    """A recorded call."""

    nbytes: int

    def replay(self) -> None:
        """Do all of it again: the same kernels, on the same addresses."""


class Recorder(Protocol):
    """Records calls."""

    def why_not(self) -> str | None:
        """Why nothing can be recorded now; ``None`` if it can."""

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Any, Replay]:
        """What ``run`` returns, none of it computed yet, and what computes it.

        Args:
            run: the work; nothing of it happens before the first replay.
            pool: recordings with one pool share the memory that they use in passing.

        Raises:
            Uncapturable: it does what cannot be repeated. Nothing has happened then, but a pool
                without any other recording is used up.
        """

    def make_pool(self) -> Any:
        """A new pool."""


class Watch(TorchDispatchMode):
    """Refuses, before it happens, what a graph would not repeat; holds what the graph reads.

    A value that goes to the host or comes from it would be that of the recording for ever; random
    numbers come from a generator whose state the host keeps.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type
        self.held: dict[int, Tensor] = {}  # by their storage
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if torch.Tag.nondeterministic_seeded in func.tags and _dropout(func, args, kwargs) != 0:
            raise Uncapturable(f"the model draws random numbers ({name})")
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in (
            func.tags
        ):
            raise Uncapturable(f"the model reads a value back to the host ({name})")
        tensors = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
        self._refuse_copies(name, tensors, kwargs)
        for tensor in tensors:
            storage = tensor.untyped_storage()._cdata
            if tensor.device.type == self._type and storage not in self._made:
                self.held[storage] = tensor
        out = func(*args, **kwargs)
        made = (x.untyped_storage()._cdata for x in _flat(out) if isinstance(x, Tensor))
        self._made.update(storage for storage in made if storage not in self.held)
        return out

    def _refuse_copies(self, name: str, tensors: list[Tensor], kwargs: dict) -> None:
        if self._type == "cpu":
            return
        kinds = {tensor.device.type for tensor in tensors}
        to = kwargs.get("device")
        to_type = None if to is None else torch.device(to).type
        if "_copy" in name or "copy_" in name:
            if to_type is not None:
                kinds.add(to_type)
            if len(kinds) > 1:
                raise Uncapturable(f"the model copies between host and device ({name})")


def _dropout(func: Any, args: tuple, kwargs: dict) -> float | None:
    """The dropout that an op was asked for: attention without any draws nothing."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p")
            return argument.default_value if given is None else given
    return None


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]


class CudaReplay:
    """A CUDA graph, and what it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, held: list[Tensor], nbytes: int) -> None:
        self._graph, self._held, self.nbytes = graph, held, nbytes

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Records CUDA graphs on a stream of its own.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def why_not(self) -> str | None:
        if torch.cuda.is_current_stream_capturing():
            return "the calling code captures a graph of its own"
        return None

    def make_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Any], pool: Any) -> tuple[Any, Replay]:
        graph, watch = torch.cuda.CUDAGraph(), Watch(self._device)
        before = torch.cuda.memory_reserved(self._device)
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        collects = gc.isenabled()
        gc.disable()  # a graph that is destroyed meanwhile would spoil this one
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    with watch:
                        out = run()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # which says less than the first
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Uncapturable:
            raise
        except Exception as error:
            what = str(error).strip().splitlines() or [""]
            raise Uncapturable(f"{type(error).__name__}: {what[0]}") from error
        finally:
            if collects:
                gc.enable()
            caller.wait_stream(self._stream)
        grown = max(torch.cuda.memory_reserved(self._device) - before, 0)
        return out, CudaReplay(graph, list(watch.held.values()), grown)
