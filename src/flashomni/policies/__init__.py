"""Policies: AttentionSite -> Symbols. One file a method, or a package of yours with an entry point.

Letters in shapes: B batch, H num_heads, M, N tokens, D head_dim, Mb and Nb query and key blocks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from flashomni.policies._site import AttentionSite
from flashomni.policies._trained import refuse_trained
from flashomni.registry import Registry
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import RESOLUTIONS

__all__ = [
    "POLICIES", "AttentionSite", "Policy", "check_bool", "check_int", "check_range",
    "check_resolution", "fields",
    "make_policy", "parse_extent", "policies", "policy", "refuse_trained",
    "require_text",
]  # fmt: skip


class Policy:
    """Base of all policies: a frozen dataclass whose fields are JSON values.

    Attributes:
        caches: whether S_c bits can be 0. If not, no history is kept for this policy.
        needs_text: whether it chooses by the text, so that a grid without text is refused.
        prefers_text: whether it chooses by the text where there is any. For a policy of either kind
            a recipe may name another that runs where there is none.
        amount: its setting that says how much S_s visits or skips, a share; empty if there is none.
    """

    name: ClassVar[str]
    caches: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    prefers_text: ClassVar[bool] = False
    amount: ClassVar[str] = ""

    def __call__(self, site: AttentionSite) -> Symbols:
        """Choose what the coming Dispatch steps compute. Never synchronises with the host.

        Raises:
            ValueError: the grid lacks what the policy chooses by.
        """
        raise TypeError(f"{type(self).__name__} does not implement __call__")

    def known_fraction(self, grid: Grid) -> float | None:
        """The computed fraction of S_c, where it does not depend on q and k."""
        return None if self.caches else 1.0

    def wants_shape(self) -> bool:
        """Whether it looks at ``grid.shape``: only then are a model's position ids read."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., field: value}``, all JSON values.

        Raises:
            ValueError: the class has no name of its own, or a setting is no JSON value.
        """
        cls = type(self)
        if "name" not in vars(cls):
            raise ValueError(
                f"{cls.__qualname__} is not registered, so that nobody can ask for it by name: "
                f'put @policy("its-name") above @dataclass(frozen=True) of class {cls.__name__}'
            )
        settings = {f.name: getattr(self, f.name) for f in fields(cls)}
        for setting, value in settings.items():
            _check_json(cls.name, setting, value)
        return {"name": cls.name, **settings}


def fields(cls: type[Policy]) -> tuple[dataclasses.Field, ...]:
    """The settings of a policy class."""
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every policy is a dataclass


POLICIES: Registry[type[Policy]] = Registry("policy", "flashomni.policies", "flashomni.policies")
P = TypeVar("P", bound=type[Policy])


def policy(name: str) -> Callable[[P], P]:
    """Register a policy under the name that users write; above ``@dataclass(frozen=True)``.

    Raises:
        TypeError: it is no frozen dataclass, or no ``Policy``.
        ValueError: the name is taken, or the default of a setting is no JSON value.
    """
    if not isinstance(name, str):
        raise TypeError(f'@policy needs a name, @policy("its-name"), got {name!r}')

    def keep(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Policy)):
            raise TypeError(f"policy {name} must be a subclass of Policy, got {cls!r}")
        parameters = vars(cls).get("__dataclass_params__")
        if parameters is None or not parameters.frozen:
            raise TypeError(
                f"policy {cls.__name__} must be a frozen dataclass: "
                f'put @policy("{name}") above @dataclass(frozen=True)'
            )
        for setting in fields(cls):
            if setting.name == "name":
                raise TypeError(f"policy {cls.__name__}: a setting must not be called name")
            if setting.default is not dataclasses.MISSING:
                _check_json(name, setting.name, setting.default)
        POLICIES.add(name, cls)
        cls.name = name
        return cls

    return keep


def policies() -> dict[str, type[Policy]]:
    """Every policy class by name."""
    return POLICIES.all()


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy ``name`` with these settings.

    Raises:
        ValueError: no such policy, no such setting, or a value out of range.
        NotImplementedError: a method that a model has to be trained with.
    """
    refuse_trained(name)
    cls = POLICIES.get(name)
    allowed = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in allowed:
            takes = ", ".join(allowed) or "no settings"
            raise ValueError(f"policy {name} takes {takes}, got {setting!r}")
    made = cls(**settings)
    made.to_dict()  # refuses what is no JSON value
    return made


def require_text(policy: Policy, grid: Grid) -> None:
    """Refuse a grid without text, for a policy that chooses by it.

    Raises:
        ValueError: there is none; the message names the policies that do without.
    """
    if not grid.text_spans:
        others = [name for name, cls in policies().items() if not cls.needs_text]
        raise ValueError(
            f"policy {policy.name} needs text tokens in the attention, got a {grid}; "
            f"policies {', '.join(others)} do not"
        )


def _check_json(name: str, setting: str, value: Any) -> None:
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{setting} of policy {name} must be a JSON value (a number, a string, true, false, "
            f"null, a list or an object of these), got {value!r}"
        )


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a setting that is not a number in ``[low, high]`` (NaN is refused)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN compares false
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Refuse a setting that is not an integer in ``[low, high]``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def check_resolution(resolution: Any) -> None:
    """Refuse a setting ``resolution`` that the choice of symbols does not know."""
    is_number = isinstance(resolution, int) and not isinstance(resolution, bool)
    if not is_number or resolution not in RESOLUTIONS:
        known = ", ".join(map(str, RESOLUTIONS))
        raise ValueError(f"resolution must be one of {known}, got {resolution!r}")


def check_bool(name: str, value: Any) -> None:
    """Refuse a setting that is not true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def parse_extent(name: str, value: Any, axes: int) -> tuple[int, ...]:
    """The integers of a setting like ``"6x8x8"``, one an axis, each from 1 to 4096.

    Raises:
        ValueError: it is something else.
    """
    parts = value.split("x") if isinstance(value, str) else []
    if len(parts) != axes or not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts):
        form = "x".join("THW"[-axes:])
        raise ValueError(f"{name} must be {form}, integers from 1 to 4096, got {value!r}")
    return tuple(int(part) for part in parts)
