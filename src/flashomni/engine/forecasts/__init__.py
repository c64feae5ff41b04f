"""Forecasts: how differences of the past combine into a value now. One file a basis.

A forecast is a function ``coefficients(order, x) -> list of order + 1 floats``: the weights of
F_0 .. F_order, x steps after the last Update. F_0 is the value itself and F_{i+1} the backward
difference of F_i per step. The first coefficient is 1 and the others are 0 at x = 0.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

Forecast = Callable[[int, float], list[float]]

_registry: dict[str, Forecast] = {}


def forecast(function: Forecast) -> Forecast:
    """Register a forecast under the name of the file it is in."""
    _registry[function.__module__.rpartition(".")[2]] = function
    return function


@functools.cache
def _discover() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__name__}.{module.name}")


def forecasts() -> dict[str, Forecast]:
    """Every forecast by name."""
    _discover()
    return dict(sorted(_registry.items()))
