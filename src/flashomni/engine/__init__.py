"""Schedule, state, forecast, recipe, and the engine that puts them together."""

from flashomni.engine.clock import Clock
from flashomni.engine.engine import Engine
from flashomni.engine.experts import Experts
from flashomni.engine.forecasts import forecasts
from flashomni.engine.layer import LayerRun
from flashomni.engine.recipe import Recipe, presets
from flashomni.engine.schedules import Plan, Schedule, Signals, StepKind, schedules
from flashomni.engine.trace import Summary

__all__ = [
    "Clock",
    "Engine",
    "Experts",
    "LayerRun",
    "Plan",
    "Recipe",
    "Schedule",
    "Signals",
    "StepKind",
    "Summary",
    "forecasts",
    "presets",
    "schedules",
]
