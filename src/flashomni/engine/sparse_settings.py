"""The section ``sparse`` of a recipe: when symbols are chosen and used, and what is carried.

Letters: r ``refresh``, D the difference between dense and sparse attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashomni.engine.schedules import StepKind
from flashomni.policies import Policy, check_bool, check_int, check_range
from flashomni.symbols.order import ORDERS

CHOOSE_AT = ("update", "computed")
SUMMARIES = (0, 1, 4, 16)
CARRY = ("off", "hold", "extrapolate")


@dataclass(frozen=True)
class SparseStep:
    """What a step does with the columns of the symbols (S_s).

    Args:
        chooses: whether they are chosen in it.
        skips: whether the attention of a computed step leaves out what they skip.
        refreshes: whether it is dense and makes D anew.
        carries: whether D is added wherever attention is sparse.
    """

    chooses: bool = False
    skips: bool = False
    refreshes: bool = False
    carries: bool = False


@dataclass(frozen=True)
class Marks:
    """What the layers of a group have done so far, in one branch.

    Args:
        chosen: the step in which columns were chosen last, ``None`` before the first.
        refreshed: the step of the last refresh.
        since: steps that were computed after it.
    """

    chosen: int | None = None
    refreshed: int | None = None
    since: int = 0


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """What is done with the symbols.

    A step *skips* that leaves out what S_s skips: Dispatch steps always, computed ones (full and
    Update steps) with ``in_computed``. Before columns are chosen nothing is skipped.

    Carry keeps D, the difference between dense and sparse attention, and adds it to what is sparse
    until it is made anew. That happens in *refreshes*, which are dense and come with every choice
    of columns; with carry, text rows visit every key.

    Args:
        degrade_below: S_q: a layer whose computed fraction is this or less is cached whole,
            attention and MLP, until it rises again; 0 never does that.
        min_skip: a row that would skip less than this share of its key blocks visits all of them:
            below break-even, skipping costs more than it saves.
        block_m: query tokens per block.
        block_n: key tokens per block.
        token_order: how vision tokens run through the sequence, so that a block of them is compact:
            ``raster`` leaves them, ``tile`` and ``hilbert`` reorder them in front of the first
            block and back behind the last. Of models with an adapter.
        choose_at: when columns are chosen: at every ``update``, in every ``computed`` step, or in
            these steps (the next computed one in each case), and kept in between. Which tiles are
            cached is chosen at every Update whatever this says.
        in_computed: whether full and Update steps skip as well.
        dense_steps: first steps in which every computed row visits every key.
        amounts: ``(progress, amount)`` pairs, progress from 0 to 1 ascending: what the policy's
            own amount (``kv_density`` of ``topk``, ``tau_kv`` of ``flashomni``, ...) is when
            columns are chosen, in a straight line between two pairs; none leaves it as it is.
        summaries: keys that stand for each skipped block, the means of as many equal parts of it;
            0 drops the block.
        carry: ``off``; ``hold`` keeps D as it was; ``extrapolate`` goes on with its last change.
        refresh: every r-th computed step is a refresh, the first of them that of the choice; 0:
            that one alone. Without ``in_computed`` every Update is one.
        extrapolation: share of the last change of D that is extrapolated.
        symbols: path of symbols (:meth:`flashomni.Engine.save_symbols`) that are used instead of
            a choice; empty chooses.
        measure: at refreshes, the share of attention mass that the visited blocks hold, and how far
            the carried D was off; for studies.

    Raises:
        ValueError: a setting is out of range, or two do not go together.
    """

    degrade_below: float = 0.0
    min_skip: float = 0.0
    block_m: int = 128
    block_n: int = 128
    token_order: str = "raster"
    choose_at: str | tuple[int, ...] = "update"
    in_computed: bool = False
    dense_steps: int = 0
    amounts: tuple[tuple[float, float], ...] = ()
    summaries: int = 0
    carry: str = "off"
    refresh: int = 4
    extrapolation: float = 0.5
    symbols: str = ""
    measure: bool = False

    def __post_init__(self) -> None:
        check_choice("token_order", self.token_order, ORDERS)
        check_range("degrade_below", self.degrade_below, 0.0, 1.0)
        check_range("min_skip", self.min_skip, 0.0, 1.0)
        for name in ("block_m", "block_n"):
            check_int(name, getattr(self, name), 16, 1024)
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {getattr(self, name)}")
        object.__setattr__(self, "choose_at", _steps(self.choose_at))
        object.__setattr__(self, "amounts", _pairs(self.amounts))
        check_bool("in_computed", self.in_computed)
        check_int("dense_steps", self.dense_steps, 0, 1000)
        if self.summaries not in SUMMARIES or isinstance(self.summaries, bool):
            allowed = ", ".join(map(str, SUMMARIES))
            raise ValueError(f"summaries must be one of {allowed}, got {self.summaries!r}")
        check_choice("carry", self.carry, CARRY)
        check_int("refresh", self.refresh, 0, 1000)
        check_range("extrapolation", self.extrapolation, 0.0, 2.0)
        if not isinstance(self.symbols, str):
            raise ValueError(f"symbols must be a path, got {self.symbols!r}")
        check_bool("measure", self.measure)
        if self.carries and self.in_computed and self.choose_at == "computed":
            raise ValueError(
                "carry makes every step dense in which columns are chosen: choose_at must be "
                f"'update' or a list of steps, got 'computed' with carry {self.carry!r}"
            )
        if self.block_n % max(self.summaries, 1):
            raise ValueError(
                f"block_n must be a multiple of summaries, got {self.block_n} and {self.summaries}"
            )

    @property
    def carries(self) -> bool:
        """Whether D is kept."""
        return self.carry != "off"

    @property
    def keeps_columns(self) -> bool:
        """Whether columns outlive the Update that chose them, or are used in computed steps."""
        others = self.in_computed or self.carries or bool(self.symbols)
        return self.choose_at != "update" or others

    def step(self, kind: StepKind, step: int, marks: Marks, has_room: bool = True) -> SparseStep:
        """What a step does.

        Args:
            kind: full, update or dispatch.
            step: of the generation.
            marks: what was done before.
            has_room: whether D fits anywhere; where it does not, nothing is carried.
        """
        carries = self.carries and has_room
        dense = step < self.dense_steps or not self.in_computed
        if kind is StepKind.DISPATCH:  # skips: in layers that are computed even so
            skips = marks.chosen is not None and not dense
            return SparseStep(skips=skips, carries=carries)
        chooses = self._chooses(kind, step, marks)
        known = chooses or marks.chosen is not None
        due = 0 < self.refresh <= marks.since + 1
        refreshes = carries and known and (chooses or dense or due)
        skips = known and not dense and not refreshes
        return SparseStep(chooses, skips, refreshes, carries)

    def _chooses(self, kind: StepKind, step: int, marks: Marks) -> bool:
        if self.symbols:
            return marks.chosen is None
        if self.choose_at == "update":
            return kind is StepKind.UPDATE
        if self.choose_at == "computed":
            return step + 1 >= self.dense_steps
        before = -1 if marks.chosen is None else marks.chosen
        return any(before < int(wanted) <= step for wanted in self.choose_at)

    def check_policies(self, *policies: Policy | None) -> None:
        """Refuse ``amounts`` for policies that have no amount."""
        for policy in policies:
            if self.amounts and policy is not None and not policy.amount:
                raise ValueError(
                    f"amounts need a policy whose share of visited blocks is a setting, which "
                    f"{policy.name!r} has not: it must be empty, got {self.amounts}"
                )

    def policy_at(self, policy: Policy, progress: float) -> Policy:
        """The policy with the amount of this progress, in (0, 1]."""
        amount = self.amount(progress)
        return policy if amount is None else replace(policy, **{policy.amount: amount})  # type: ignore[type-var]

    def amount(self, progress: float) -> float | None:
        """What the policy's amount is; ``None`` where ``amounts`` does not say."""
        if not self.amounts:
            return None
        (before, low), *rest = self.amounts
        for at, high in rest:
            if progress <= at:
                share = min(max((progress - before) / (at - before), 0.0), 1.0)
                return low + share * (high - low)
            before, low = at, high
        return low


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a setting that is none of these words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _steps(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value in CHOOSE_AT:
        return value
    steps = tuple(value) if isinstance(value, (list, tuple)) else ()
    good = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in steps)
    if not steps or not good or list(steps) != sorted(set(steps)):
        raise ValueError(
            f"choose_at must be {', '.join(CHOOSE_AT)} or a list of ascending step numbers, "
            f"got {value!r}"
        )
    return steps


def _pairs(value: Any) -> tuple[tuple[float, float], ...]:
    pairs = [tuple(p) if isinstance(p, (list, tuple)) else () for p in _listed(value)]
    good = all(len(pair) == 2 and all(map(_is_share, pair)) for pair in pairs)
    starts = [pair[0] for pair in pairs] if good else []
    if not good or starts != sorted(set(starts)):
        raise ValueError(
            "amounts must be a list of [progress, amount], both from 0 to 1, progress ascending, "
            f"got {value!r}"
        )
    return tuple((float(at), float(amount)) for at, amount in pairs)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (None,)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
