"""Adapters: one file a diffusers transformer class, found by name; and ``accelerate``.

An adapter lists the blocks of its model and runs one block with the engine's calls. It is the only
place that knows the model. Importing this package loads no diffusers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from flashomni.engine.geometry import Geometry
from flashomni.models._relies import Reliance, verify
from flashomni.registry import Registry

BlockRun = Callable[..., Any]
Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Site:
    """One transformer block.

    Args:
        name: its path in the model.
        block: the module.
        run: ``run(run, block, *args, **kwargs)`` computes what ``block(*args, **kwargs)`` would,
            with the calls of the :class:`LayerRun` it gets first. Its parameters carry the names of
            the block's own, because models pass keywords. What all blocks of a call share (a valid
            length, RoPE tables) goes through ``run.shared``.
        streams: the parameters of ``run`` that are the block's token streams. A block that is
            cached whole only adds to them.
        returns: what the block returns: ``None`` for a tuple of the streams in their order, a
            stream's name for that tensor alone, or a tuple of names with ``None`` where the block
            returns ``None``; names in it that are no streams are those of ``derived``.
        chain: whether the block may be cached in one with its neighbours. ``False`` where something
            but the next block reads what it returns (skip connections, collected hidden states).
        vision: whether the vision tokens are ``first`` or ``last`` in their stream, where it holds
            others as well.
        by_token: other parameters of ``run`` that may have an entry for each vision token, and how
            many dims they have then: ``[B, R, ...]``.
        modulated: ``modulated(block, *args, **kwargs)`` gives the block's vision tokens after its
            first norm and modulation, for schedules that look there (TeaCache); ``None`` if there
            is no such thing. A keyword ``backend`` that it has gets the one that was chosen, or
            ``None``.
        sequence: the streams in front of it as they follow one another, where ranks may share
            them: :meth:`LayerRun.begin` and RoPE tables say so, and what else has an entry for each
            token is in ``by_token``. Empty where they may not.
        stage: blocks of one number run on one sequence; between them the model sees all tokens.
        derived: ``derived[name](block, *streams)`` makes what else the block returns of the streams
            behind it: in every step, also where the block is cached whole.
    """

    name: str
    block: nn.Module
    run: BlockRun
    streams: tuple[str, ...]
    returns: str | tuple[str | None, ...] | None = None
    chain: bool = True
    vision: str = "last"
    by_token: Mapping[str, int] = field(default_factory=dict)
    modulated: Callable[..., Tensor] | None = None
    derived: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    sequence: tuple[str, ...] = ()
    stage: int = 0

    @property
    def main(self) -> int:
        """Which stream holds the vision tokens."""
        return self.streams.index("hidden_states") if "hidden_states" in self.streams else 0

    def unpack(self, output: Any) -> Streams:
        """The streams of what the block returned, in the order of ``streams``."""
        if self.returns is None:
            return tuple(output)
        if isinstance(self.returns, str):
            return (output,)
        found = dict(zip(self.returns, output, strict=True))
        return tuple(found[name] for name in self.streams)

    def pack(self, streams: Streams) -> Any:
        """What the block returns, of its streams."""
        if self.returns is None:
            return streams
        if isinstance(self.returns, str):
            return streams[0]
        found = dict(zip(self.streams, streams, strict=True))
        found |= {name: make(self.block, *streams) for name, make in self.derived.items()}
        return tuple(None if name is None else found[name] for name in self.returns)


class Adapter:
    """What the engine needs to know about one transformer class.

    Attributes:
        transformer: name of the class.
        sizes: configurations of the class by name: ``tiny`` for the contract tests, ``published``
            as the largest weights that are published.
        latents: the argument of the model that is what its output changes.
        reorders: whether its blocks may get their vision tokens in another order: what has an entry
            for each token, such as RoPE tables, then follows ``run.geometry.tokens`` (the streams
            and ``Site.by_token`` do so by themselves).
        residuals: arguments of the model that hold what is added to vision tokens behind blocks.
        parallel: the model's arguments that are its token streams ``[B, S, K]``, as they follow one
            another, where diffusers' own plan of context parallelism spreads them over ranks in
            front of the model; empty where it does so elsewhere, or not. See ``Site.sequence``.
        exit: where there are any, the module that gets the tokens next; they have the model's own
            order again in front of it, otherwise behind the last block.
    """

    transformer: ClassVar[str]
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    latents: ClassVar[str] = "hidden_states"
    reorders: ClassVar[bool] = False
    residuals: ClassVar[tuple[str, ...]] = ()
    parallel: ClassVar[tuple[str, ...]] = ()
    exit: ClassVar[str] = ""

    def build(self, size: str) -> nn.Module:
        """A model of diffusers' class with random weights.

        Args:
            size: one of ``sizes``.
        """
        if size not in self.sizes:
            raise ValueError(f"size must be one of {', '.join(self.sizes)}, got {size!r}")
        return getattr(importlib.import_module("diffusers"), self.transformer)(**self.sizes[size])

    def sites(self, model: nn.Module) -> list[Site]:
        """The blocks with joint or self attention, in the order in which they run."""
        raise TypeError(f"{type(self).__name__} does not implement sites")

    def relies_on(self, model: nn.Module) -> list[Reliance]:
        """Everything that the adapter takes apart instead of calling it: the one list of it."""
        return []

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Where the vision tokens of a call lie: frames, rows, columns, and reference images.

        Asked once a generation, and only for a policy that wants it; the function that runs a block
        hands it on: ``run.begin(..., **run.geometry.place(start, count))``, where it is not None.

        Args:
            model: the model.
            arguments: of the generation's first call, by name.
        """
        return Geometry(why="no adapter of this class tells where its tokens lie")

    def stand_ins(self, runtime: Any) -> Iterable[Any] | None:
        """What to put on a model that is not run site by site; ``None`` for one that is."""
        return None

    def variant(self, model: nn.Module) -> str:
        """What the model has that the adapter does not run, in words; empty if it runs the model.

        Such a model is learned, as one without an adapter is.
        """
        return ""

    def check(self, model: nn.Module) -> None:
        """Whether the model is, or still is, what the adapter understands. Costs microseconds.

        Raises:
            NotImplementedError: something that the adapter relies on is another, or the model is a
                variant that the adapter cannot run (those add to this method).
        """
        verify(self.relies_on(model))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        """A small random model and the arguments of one call, for the contract tests.

        The sequence must not be a multiple of 128 tokens, and neither must the text. Arguments are
        tensors or lists with the batch (2) first, except where "ids" or "indices" is in their name;
        ``hidden_states`` has the shape of the output, ``encoder_hidden_states`` is the text.
        """
        raise TypeError(f"{type(self).__name__} does not implement tiny")


ADAPTERS: Registry[Adapter] = Registry("adapter", "flashomni.models", "flashomni.adapters")


def adapter(transformer: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Register an adapter for the transformer class of that name."""

    def keep(cls: type[Adapter]) -> type[Adapter]:
        ADAPTERS.add(transformer, cls(), cls)
        cls.transformer = transformer
        return cls

    return keep


def adapters() -> dict[str, Adapter]:
    """Every adapter by the name of its transformer class."""
    return ADAPTERS.all()


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a transformer, by the names of its class and base classes.

    Raises:
        ValueError: there is none; the message lists the classes that are supported.
    """
    known = adapters()
    for cls in type(model).__mro__:
        if cls.__name__ in known:
            return known[cls.__name__]
    raise ValueError(
        f"transformer must be one of {', '.join(adapters())}, got {type(model).__name__}"
    )


def tiers() -> dict[str, tuple[str, str]]:
    """What is known of each transformer class: its tier, and where that stands or what it says."""
    table = {
        cls: ("declared", ", ".join(f"{key}={value}" for key, value in said.items()))
        for cls, said in DECLARED.items()
    }
    known = {cls: ("adapter", type(adapter).__module__) for cls, adapter in adapters().items()}
    return dict(sorted({**table, **known}.items()))


from flashomni.models._accelerate import (  # noqa: E402
    accelerate,
    engine_of,
    restore,
    transformers_of,
)
from flashomni.models._foresee import Foreseen, foresee  # noqa: E402
from flashomni.models._memory import CacheBytes, cache_bytes  # noqa: E402
from flashomni.models.generic import DECLARED, Blocks  # noqa: E402

__all__ = [
    "ADAPTERS", "Adapter", "BlockRun", "Blocks", "CacheBytes", "Foreseen", "Geometry", "Reliance",
    "Site", "Streams", "accelerate", "adapter", "adapters", "cache_bytes", "engine_of",
    "find_adapter", "foresee",
    "restore", "tiers", "transformers_of",
]  # fmt: skip
