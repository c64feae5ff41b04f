"""Ranks that share a sequence inside of a model's blocks: in front of the first, behind the last.

The model itself computes everything else on every rank: its embeddings, masks, RoPE tables and its
last projection are a thousandth of its blocks. So no plan of its modules is needed, and nothing
that it derives of its tokens is of a part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashomni.engine.runtime import Runtime
from flashomni.models import Adapter, Site
from flashomni.parallel import Layout, Shard


class Spread:
    """Spreads what the blocks of one model get.

    Args:
        runtime: of the model.
        sites: its blocks.
        adapter: of the model.
    """

    def __init__(self, runtime: Runtime, sites: Sequence[Site], adapter: Adapter) -> None:
        self._runtime, self._sites, self._adapter = runtime, sites, adapter
        self._shard: Shard | None = None
        self._made: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @property
    def active(self) -> bool:
        """Whether ranks share the sequence inside of the blocks."""
        sharding = self._runtime.sharding
        return sharding.ranks is not None and sharding.inside

    def enter(
        self, index: int, names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a block, of this rank's tokens.

        Args:
            index: of the block.
            names: of its parameters.
            args: as the model gives them, like ``kwargs``.
        """
        site, named = self._sites[index], {**dict(zip(names, args, strict=False)), **kwargs}
        if index == 0 or self._sites[index - 1].stage != site.stage:
            streams = {name: named[name] for name in site.sequence}
            self._shard = self._begin(streams)
            named |= {name: self._shard.enter(x, name) for name, x in streams.items()}
        shard = self._shard
        assert shard is not None
        main = site.streams[site.main]
        for name, dims in site.by_token.items():
            value = named.get(name)
            if isinstance(value, Tensor) and value.ndim == dims and value.shape[1] > 1:
                named[name] = self._once(shard, value, main)
        return (), named

    def leave(self, index: int, streams: Sequence[Tensor]) -> list[Tensor]:
        """The streams behind a block, of all tokens where the model itself gets them.

        Args:
            index: of the block.
            streams: of this rank's tokens, in the order of ``Site.streams``.
        """
        site, shard = self._sites[index], self._shard
        if index + 1 < len(self._sites) and self._sites[index + 1].stage == site.stage:
            return list(streams)
        assert shard is not None
        self._shard = None
        self._made.clear()
        return [shard.leave(x, name) for x, name in zip(streams, site.streams, strict=True)]

    def _begin(self, streams: Mapping[str, Tensor]) -> Shard:
        """A sequence begins.

        Raises:
            NotImplementedError: the model adds to the tokens between blocks.
            ValueError: there are fewer tokens than ranks.
        """
        runtime, name = self._runtime, type(self._runtime.model).__name__
        self._made.clear()
        ranks, inputs = runtime.sharding.ranks, runtime.call.inputs
        assert ranks is not None
        added = [each for each in self._adapter.residuals if inputs.get(each) is not None]
        if added:
            raise NotImplementedError(
                f"{' and '.join(added)} of {name} on several ranks is not supported: each rank has "
                "its own tokens only; run it on one card"
            )
        for each, x in streams.items():
            if x.shape[1] < ranks.size:
                raise ValueError(
                    f"{each} has {x.shape[1]} tokens, which {ranks.size} ranks cannot share: take "
                    "fewer ranks"
                )
        layout = Layout.split([x.shape[1] for x in streams.values()], ranks.size)
        shard = Shard(ranks, layout, tuple(streams), inside=True)
        runtime.call.spread(shard)
        return shard

    def _once(self, shard: Shard, x: Tensor, name: str) -> Tensor:
        """What all blocks get, cut once a call; it is held, so that its id stays its own."""
        if torch.compiler.is_compiling():
            return shard.enter(x, name)
        key = id(x), name
        if key not in self._made:
            self._made[key] = x, shard.enter(x, name)
        return self._made[key][1]
