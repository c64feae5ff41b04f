"""Which orders may be generated as one batch, if each is to have the pixels it has alone."""

from __future__ import annotations

from collections.abc import Hashable

from flashomni.engine import Recipe
from flashomni.policies import Policy


def decides_together(recipe: Recipe, steps: int) -> bool:
    """Whether what one item of a batch skips depends on the others.

    A schedule that looks at tensors sees the whole batch, S_q is decided by the mean of S_c over
    it, and branches of guidance are left out for all of it.

    Args:
        recipe: under which they are generated.
        steps: of denoising.
    """
    own = (group.schedule for group in recipe.groups)
    schedules = [recipe.schedule, *(each for each in own if each is not None)]
    if any(each.plan(steps, recipe.order) is None for each in schedules) or recipe.guidance.acts:
        return True
    policies = [each for each in (recipe.policy, recipe.policy_without_text) if each is not None]
    return recipe.sparse.degrade_below > 0 and any(map(_measures, policies))


def _measures(policy: Policy) -> bool:
    """Whether the share of tiles that it computes depends on q and k."""
    return policy.caches and type(policy).known_fraction is Policy.known_fraction


KEPT = 1024  # keys have numbers of requests in them: there is no end of them


class Proof:
    """Which sizes of batches gave, for a key, the bits of each order alone.

    How a matrix product is summed depends on its shape, not on its values, so what was seen once
    holds for the shape; a size that was seen to differ is not tried again.
    """

    def __init__(self) -> None:
        self._same: dict[tuple[Hashable, int], bool] = {}

    def known(self, key: Hashable, size: int) -> bool | None:
        """Whether a batch of that size is exact; ``None`` if nobody has looked."""
        return self._same.get((key, size))

    def saw(self, key: Hashable, size: int, same: bool) -> None:
        self._same[key, size] = same
        if len(self._same) > KEPT:
            del self._same[next(iter(self._same))]

    def limit(self, key: Hashable, most: int) -> int:
        """The largest size up to ``most`` that is exact, or may be."""
        return next((n for n in range(most, 1, -1) if self._same.get((key, n)) is not False), 1)
