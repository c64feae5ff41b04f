"""Another order of the vision tokens, on a model: streams, and what goes with each token.

Streams change their order in front of the first block, and change back behind the last one. What a
model hands each block beside them follows (:func:`in_order`), or the adapter sees to it (RoPE
tables). Where a model adds to its tokens behind blocks, as with a ControlNet, that follows too
(:class:`ResidualForward`), and the tokens change back at what comes next (:class:`ExitForward`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.runtime import Runtime
from flashomni.engine.token_order import TokenOrder
from flashomni.models import Adapter, Site
from flashomni.models._stand_in import InsteadOfForward


def tokens_of(runtime: Runtime) -> TokenOrder | None:
    """The order of the tokens in the call that is under way; ``None`` for the model's own."""
    generation = runtime.last if runtime.running else None
    geometry = None if generation is None else generation.geometry
    return None if geometry is None else geometry.tokens


def exit_of(runtime: Runtime, adapter: Adapter) -> str:
    """The module in front of which tokens change back; none where the last block does it."""
    return adapter.exit if runtime.recipe.sparse.token_order != "raster" else ""


def around(runtime: Runtime, adapter: Adapter) -> Iterator[InsteadOfForward]:
    """What stands in around the blocks; each puts itself on the model when it is asked for."""
    name = exit_of(runtime, adapter)
    if name:
        exit = ExitForward(runtime, name)
        yield exit
        yield ResidualForward(runtime, adapter.residuals, exit)


def in_order(
    tokens: TokenOrder,
    site: Site,
    names: Sequence[str],
    is_first: bool,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block, in the order of the tokens.

    Args:
        tokens: the order.
        site: of the block.
        names: of its parameters.
        is_first: whether it is the first block: behind it the streams are in order already.
        args: as the model gives them, like ``kwargs``.
    """
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    if is_first:
        main = site.streams[site.main]
        named[main] = tokens.enter(named[main])
    for name, dims in site.by_token.items():
        value = named.get(name)
        if isinstance(value, Tensor) and value.ndim == dims and value.shape[1] > 1:
            named[name] = tokens.once(value)
    return (), named


class ExitForward(InsteadOfForward):
    """Gets the tokens in the model's own order.

    Args:
        runtime: of the model.
        name: path of the module; its first argument are the tokens.
    """

    def __init__(self, runtime: Runtime, name: str) -> None:
        super().__init__(runtime.model.get_submodule(name))
        self.runtime, self.name = runtime, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active and args:
            args = (self._left(args[0]), *args[1:])
        elif self.active:
            first = next(iter(self.__signature__.parameters))
            kwargs = {**kwargs, first: self._left(kwargs[first])}
        return self.original(*args, **kwargs)

    @torch.compiler.disable
    def _left(self, x: Tensor) -> Tensor:
        tokens = tokens_of(self.runtime)
        return x if tokens is None else tokens.leave(x)


class ResidualForward(InsteadOfForward):
    """Lets what a model adds to its tokens behind blocks follow their order.

    Args:
        runtime: of the model.
        names: of its arguments that hold it.
        exit: where the tokens change back.
    """

    def __init__(self, runtime: Runtime, names: tuple[str, ...], exit: ExitForward) -> None:
        super().__init__(runtime.model)
        self.runtime, self._residuals, self._exit = runtime, names, exit
        self._names = list(self.__signature__.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            args, kwargs = self._in_order(args, kwargs)
        return self.original(*args, **kwargs)

    @torch.compiler.disable
    def _in_order(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        tokens = tokens_of(self.runtime)
        if tokens is None:
            return args, kwargs
        name = self._exit.name
        if self.runtime.model.get_submodule(name) is not self._exit.module:
            raise NotImplementedError(
                f"{name} is another module than when the model was accelerated, and tokens would "
                f"stay in order {tokens.order}; accelerate anew"
            )
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for each in self._residuals:
            if each in named:
                named[each] = tokens.residuals(each, named[each])
        return (), named
