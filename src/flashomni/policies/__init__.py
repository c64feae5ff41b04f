"""Policies: (q, k, grid, progress) -> Symbols. One file a method; the file name is its name.

Letters in shapes: B batch, H num_heads, M, N tokens, D head_dim, Mb and Nb query and key blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from flashomni.symbols import Grid, Symbols


class Policy:
    """Base of all policies: a frozen dataclass whose fields are JSON values.

    Attributes:
        caches: whether S_c bits can be 0. If not, no history is kept for this policy.
        recipe: settings of a recipe that the method asks for, by field name of ``Recipe``.
    """

    name: ClassVar[str]
    caches: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {}

    def __call__(self, q: Tensor, k: Tensor, grid: Grid, progress: Tensor) -> Symbols:
        """Choose what the coming Dispatch steps compute. Never synchronises with the host.

        Args:
            q: ``[B, M, H, D]`` queries after norm and RoPE, as attention gets them.
            k: ``[B, N, Hkv, D]`` keys likewise.
            grid: blocks, text span and valid length.
            progress: fp32 scalar on the device, (step + 1) / num_steps, in (0, 1].
        """
        raise TypeError(f"{type(self).__name__} does not implement __call__")

    def known_fraction(self, grid: Grid) -> float | None:
        """The computed fraction of S_c, where it does not depend on q and k."""
        return None if self.caches else 1.0

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., field: value}``, all JSON values."""
        return {"name": self.name, **{f.name: getattr(self, f.name) for f in fields(type(self))}}


def fields(cls: type[Policy]) -> tuple[dataclasses.Field, ...]:
    """The settings of a policy class."""
    return dataclasses.fields(cls)  # type: ignore[arg-type]  # every policy is a dataclass


_registry: dict[str, type[Policy]] = {}


def policy(cls: type[Policy]) -> type[Policy]:
    """Register a policy under the name of the file it is in."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"policy {cls.__name__} must be a dataclass: put @policy above @dataclass")
    cls.name = cls.__module__.rpartition(".")[2]
    _registry[cls.name] = cls
    return cls


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")


def policies() -> dict[str, type[Policy]]:
    """Every policy class by name."""
    _discover()
    return dict(sorted(_registry.items()))


def make_policy(name: str, **settings: Any) -> Policy:
    """The policy ``name`` with these settings.

    Raises:
        ValueError: no such policy, no such setting, or a value out of range.
    """
    known = policies()
    if name not in known:
        raise ValueError(f"policy must be one of {', '.join(known)}, got {name!r}")
    allowed = [f.name for f in fields(known[name])]
    for setting in settings:
        if setting not in allowed:
            takes = ", ".join(allowed) or "no settings"
            raise ValueError(f"policy {name} takes {takes}, got {setting!r}")
    return known[name](**settings)


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a setting that is not a number in ``[low, high]`` (NaN is refused)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int) -> None:
    """Refuse a setting that is not an integer in ``[low, high]``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Refuse a setting that is not true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
