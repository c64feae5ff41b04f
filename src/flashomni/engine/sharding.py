"""Whether a model's sequence is spread over ranks, asked at each call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashomni.engine.recipe import Recipe
from flashomni.parallel import Agreement, Layout, Ranks, Shard

TEXT = "encoder_hidden_states"


class Found(NamedTuple):
    """How a model is spread.

    Args:
        ranks: that share its sequence.
        any_length: whether lengths may be uneven.
        inside: whether its blocks alone see a share (else the model itself does).
    """

    ranks: Ranks
    any_length: bool = True
    inside: bool = True


class Sharding:
    """Finds the :class:`Shard` of each call.

    Args:
        model: whose calls.
        find: the ranks by now; ``None`` on one card. Raises for what cannot be accelerated.
        streams: the model's arguments that are its token streams ``[B, S, K]``, in the order of
            the sequence, where the model itself sees a share of them.
        latents: the argument of the model that is what its output changes.

    Attributes:
        ranks: of the last generation that began; ``None`` on one card.
        inside: whether blocks alone see a share.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[], Found | None],
        streams: tuple[str, ...],
        latents: str = "hidden_states",
    ) -> None:
        self._model, self._find, self._streams, self._latents = model, find, streams, latents
        self._config: Any = None
        self._any_length = False
        self._pending: Agreement | None = None
        self._is_first = False
        self.ranks: Ranks | None = None
        self.inside = False

    def start(self) -> None:
        """A generation begins."""
        found, self._config = self._find(), config_of(self._model)
        self.ranks, self._any_length, self.inside = found or (None, False, False)
        self._pending, self._is_first = None, True
        if self.ranks is not None:
            self.ranks.restart()

    def of(self, inputs: Mapping[str, Any]) -> Shard | None:
        """How a call is shared out, as far as the model's arguments tell.

        Args:
            inputs: arguments of the model, whole, by name.

        Raises:
            NotImplementedError: parallelism was changed since the generation began.
            ValueError: lengths do not divide; or the ranks began with different arguments.
        """
        if config_of(self._model) is not self._config:
            raise NotImplementedError(
                f"parallelism of the {type(self._model).__name__} was changed within a generation: "
                "call enable_parallelism between generations"
            )
        if self.ranks is None:
            return None
        self.settle()
        if self.inside:
            self._agree(agreed_on(inputs, (self._latents, TEXT)))
            return None
        streams = {name: inputs[name] for name in self._streams}
        lengths = {name: x.shape[1] for name, x in streams.items()}
        for name, length in lengths.items():
            if length < self.ranks.size or (length % self.ranks.size and not self._any_length):
                raise ValueError(
                    f"{name} has {length} tokens, which {self.ranks.size} ranks cannot share: pass "
                    "ContextParallelConfig(..., ulysses_anything=True) for lengths that do not "
                    "divide, and at least one token a rank"
                )
        self._agree(streams)
        layout = Layout.split(tuple(lengths.values()), self.ranks.size)
        return Shard(self.ranks, layout, self._streams)

    def _agree(self, given: Mapping[str, Tensor]) -> None:
        """At the first call, ask whether all ranks got the same; the answer is read later."""
        if not self._is_first or self.ranks is None:
            return
        self._is_first = False
        self._pending = Agreement(self.ranks, given)

    def settle(self) -> None:
        """Ask what the ranks began with; it was sent a step ago.

        Raises:
            ValueError: different things.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.check()


def agreed_on(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Arguments that ranks must have been given alike, as a tensor each.

    Args:
        inputs: of the model; some take a list, an item of the batch each.
        names: of those that are there.
    """
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return {
        name: x if isinstance(x, Tensor) else torch.cat([each.flatten() for each in x])
        for name, x in given.items()
    }


def config_of(model: nn.Module) -> Any:
    """What diffusers was told about parallelism."""
    return getattr(model, "_parallel_config", None)


def why_not(recipe: Recipe, inside: bool) -> list[str]:
    """What of a recipe does not work on several ranks, in words.

    Ranks have to take the same way through a step, so that each decision is made of what all of
    them know: none may look at a rank's own rows or heads alone.

    Args:
        recipe: what is to run.
        inside: whether the model itself sees the whole sequence.
    """
    found, schedule, sparse = [], recipe.schedule, recipe.sparse
    if schedule.decides or schedule.measures or schedule.modulates:
        found.append(f"schedule {schedule.name!r} looks at tokens, and a rank has its own only")
    if sparse.token_order != "raster" and not inside:
        found.append(
            f"token_order {sparse.token_order!r} reorders the whole sequence, of which diffusers' "
            "plan gives a rank its share: take accelerate(..., ulysses=n) instead"
        )
    if sparse.symbols:
        found.append("symbols of a file are of all heads")
    policies = (*recipe.policies, recipe.policy_without_text)
    if any(getattr(policy, "share_heads", False) for policy in policies):
        found.append("share_heads sums over heads, of which a rank has its own only")
    return found
