"""Whether a model's sequence is spread over ranks, asked at each call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from flashomni.engine.recipe import Recipe
from flashomni.parallel import Agreement, Layout, Ranks, Shard


class Sharding:
    """Finds the :class:`Shard` of each call.

    Args:
        model: whose calls.
        find: the ranks by now, and whether lengths may be uneven; ``None`` on one card. Raises for
            what cannot be accelerated.
        streams: the model's arguments that are its token streams ``[B, S, K]``, in the order of
            the sequence.

    Attributes:
        ranks: of the last generation that began; ``None`` on one card.
    """

    def __init__(
        self,
        model: nn.Module,
        find: Callable[[], tuple[Ranks, bool] | None],
        streams: tuple[str, ...],
    ) -> None:
        self._model, self._find, self._streams = model, find, streams
        self._config: Any = None
        self._any_length = False
        self._pending: Agreement | None = None
        self._is_first = False
        self.ranks: Ranks | None = None

    def start(self) -> None:
        """A generation begins."""
        self._config, found = config_of(self._model), self._find()
        self.ranks, self._any_length = found or (None, False)
        self._pending, self._is_first = None, True
        if self.ranks is not None:
            self.ranks.restart()

    def of(self, inputs: Mapping[str, Any]) -> Shard | None:
        """How a call is shared out.

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
        streams = {name: inputs[name] for name in self._streams}
        lengths = {name: x.shape[1] for name, x in streams.items()}
        for name, length in lengths.items():
            if length < self.ranks.size or (length % self.ranks.size and not self._any_length):
                raise ValueError(
                    f"{name} has {length} tokens, which {self.ranks.size} ranks cannot share: pass "
                    "ContextParallelConfig(..., ulysses_anything=True) for lengths that do not "
                    "divide, and at least one token a rank"
                )
        if self._is_first:
            self._is_first = False
            self._pending = Agreement(self.ranks, streams)
        layout = Layout.split(tuple(lengths.values()), self.ranks.size)
        return Shard(self.ranks, layout, self._streams)

    def settle(self) -> None:
        """Ask what the ranks began with; it was sent a step ago.

        Raises:
            ValueError: different things.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.check()


def config_of(model: nn.Module) -> Any:
    """What diffusers was told about parallelism."""
    return getattr(model, "_parallel_config", None)


def why_not(recipe: Recipe) -> list[str]:
    """What of a recipe does not work on several ranks, in words.

    Ranks have to take the same way through a step, so that each decision is made of what all of
    them know: none may look at a rank's own rows or heads alone.
    """
    found, schedule, sparse = [], recipe.schedule, recipe.sparse
    if schedule.decides or schedule.measures or schedule.modulates:
        found.append(f"schedule {schedule.name!r} looks at tokens, and a rank has its own only")
    if sparse.token_order != "raster":
        found.append(f"token_order {sparse.token_order!r} reorders the whole sequence")
    settings = [sparse, *(group.sparse for group in recipe.groups if group.sparse is not None)]
    for each in (each for each in settings if each.carries):
        found.append(f"carry {each.carry!r} depends on the memory that a rank has free")
    if sparse.symbols:
        found.append("symbols of a file are of all heads")
    policies = (*recipe.policies, recipe.policy_without_text)
    if any(getattr(policy, "share_heads", False) for policy in policies):
        found.append("share_heads sums over heads, of which a rank has its own only")
    return found
